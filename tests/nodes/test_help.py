"""Every node explains itself: tooltips, help pages and translations, for whatever ComfyUI shows of it.

After a change to a node, `DNG_WRITE_LOCALES=1 pytest tests/nodes/test_help.py` writes the English definitions anew and
adds to the others what they lack, in English, for a translator (the test below says so until it is translated).
"""

import importlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dng_core.settings import PRESETS

ROOT = Path(__file__).resolve().parents[2]
LOCALES = ROOT / "locales"
PAGES = ROOT / "web" / "docs"
LANGUAGES = ("fr",)  # beside English; of those that ComfyUI's front end ships
READ_BY_VUE = re.compile(r"[{}@|]")  # vue-i18n would take these in a message for its own syntax


@pytest.fixture(scope="module")
def nodes(pack: Any) -> list[Any]:
    return list(importlib.import_module(f"{pack.__name__}.nodes").NODES)


@pytest.fixture(scope="module")
def definitions(nodes: list[Any]) -> dict[str, Any]:
    """What the nodes say of themselves, in the form of ComfyUI's nodeDefs.json."""
    return {schema.node_id: _definition(schema) for schema in (node.define_schema() for node in nodes)}


def _definition(schema: Any) -> dict[str, Any]:
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {key: {"name": i.id, "tooltip": i.tooltip} for key, i in _inputs(schema)},
        "outputs": {
            str(n): {"name": o.display_name or o.io_type, "tooltip": o.tooltip} for n, o in enumerate(schema.outputs)
        },
    }


def _inputs(schema: Any) -> Iterator[tuple[str, Any]]:
    """The inputs by their keys in nodeDefs.json. That of a choice's input begins with the choice: settings_prior."""
    for outer, *nested in (given.get_all() for given in schema.inputs):
        yield outer.id, outer
        yield from ((f"{outer.id}_{inner.id}", inner) for inner in nested)


def texts(value: Any, path: str = "") -> dict[str, str]:
    """All text of nested definitions, by path."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in texts(inner, f"{path}/{key}").items()}
    return {path: value}


def read(language: str) -> dict[str, Any]:
    return dict(json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8")))


def filled(wanted: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The structure of ``wanted`` with the texts of ``known`` where it has them."""
    return {
        key: filled(value, known.get(key, {})) if isinstance(value, dict) else known.get(key, value)
        for key, value in wanted.items()
    }


@pytest.fixture(scope="module", autouse=True)
def write_if_asked(definitions: dict[str, Any]) -> None:
    if os.environ.get("DNG_WRITE_LOCALES"):
        for language in ("en", *LANGUAGES):
            path = LOCALES / language / "nodeDefs.json"
            content = definitions if language == "en" else filled(definitions, read(language))
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def test_every_node_input_and_output_has_an_explanation(definitions):
    assert len(definitions) > 10
    assert [path for path, text in texts(definitions).items() if not text or not text.strip()] == []
    for path, text in texts(definitions).items():
        if path.endswith(("/tooltip", "/description")):
            assert len(text) > 10 and text.endswith("."), f"{path}: {text}"


def test_the_english_locale_says_what_the_nodes_say(definitions):
    assert read("en") == definitions


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_translated(definitions, language):
    english, other = texts(definitions), texts(read(language))
    assert other.keys() == english.keys()
    same = [path for path in english if path.endswith(("/tooltip", "/description")) and other[path] == english[path]]
    assert same == []


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_no_text_holds_what_the_front_end_would_read_as_syntax(language):
    assert {path: text for path, text in texts(read(language)).items() if READ_BY_VUE.search(text)} == {}


def test_comfyui_serves_the_translations(comfyui, tmp_path, monkeypatch):
    """ComfyUI's own reader finds the files where a pack has them."""
    folder_paths = importlib.import_module("folder_paths")
    manager = importlib.import_module("app.custom_node_manager")
    (tmp_path / "pack").symlink_to(ROOT, target_is_directory=True)
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda kind: [str(tmp_path)])
    translations = manager.CustomNodeManager().build_translations()
    for language in ("en", *LANGUAGES):
        assert translations[language]["nodeDefs"] == read(language)


def test_every_node_has_a_help_page_that_names_its_inputs_and_outputs(definitions):
    for node, definition in definitions.items():
        page = (PAGES / f"{node}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {definition['display_name']}\n"), node
        for name in (given["name"] for given in definition["inputs"].values()):
            assert f"`{name}`" in page, f"{node}.md does not name its input {name}"


def test_no_help_page_is_left_without_its_node(definitions):
    assert {path.stem for path in PAGES.glob("*.md")} == set(definitions)


def test_pictures_on_help_pages_are_there_and_small():
    shown = 0
    for page in PAGES.glob("*.md"):
        for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            picture = PAGES / name
            assert picture.stat().st_size < 300_000, name
            Image.open(picture).verify()
            shown += 1
    assert shown >= 3


def test_pages_of_nodes_with_presets_give_their_values(definitions):
    for node, definition in definitions.items():
        page = (PAGES / f"{node}.md").read_text(encoding="utf-8")
        for name, s in PRESETS.items() if "settings" in definition["inputs"] else ():
            numbers = (s.guidance_scale, s.prior, s.temperature, s.offset)
            cells = " | ".join([name, *(f"{n:g}" for n in numbers), s.offset_form, f"{s.p_max:g} | {s.max_scale:g}"])
            assert f"| {cells} |" in page, f"{node}.md: {name}"


def test_links_and_pictures_of_the_guides_are_there():
    guides = list((ROOT / "docs").glob("*.md"))
    assert len(guides) >= 2
    for guide in guides:
        for name in re.findall(r"\]\(([^):#]+)\)", guide.read_text(encoding="utf-8")):
            assert (guide.parent / name).exists(), f"{guide.name}: {name}"
