"""Every node explains itself: tooltips, help pages and translations, for whatever ComfyUI shows of it.

After a change to a node, `DNG_WRITE_LOCALES=1 pytest tests/nodes/test_help.py` writes the English definitions anew and
adds to the others what they lack, in English, for a translator (a test below says so until it is translated). It also
writes the tables of inputs and outputs on the help pages anew, in every language, by what the definitions say.
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
HEADS = {
    "en": ("input", "output", "meaning"),
    "fr": ("entrée", "sortie", "signification"),
    "zh": ("\u8f93\u5165", "\u8f93\u51fa", "\u542b\u4e49"),
}
"""The heads of the tables on help pages, in English and in each other language that the pack speaks. They are codes of
ComfyUI's front end: it asks for DNGCompare/zh.md, and shows DNGCompare.md where there is none."""
LANGUAGES = [language for language in HEADS if language != "en"]
READ_BY_VUE = re.compile(r"[{}@|]")  # vue-i18n would take these in a message for its own syntax
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")
LARGEST_PICTURE = 80_000  # bytes: every install downloads them
LARGEST_GALLERY = 400_000
TALLEST_PICTURE = 600  # pixels
languages = pytest.mark.parametrize("language", list(HEADS))
DEV_ONLY = {"DNGOracleModel", "DNGOracleCondition", "DNGOracleLatent", "DNGOracleReport"}


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


def page_file(node: str, language: str) -> Path:
    """Where the front end looks for a page. English is the page of every language that has none of its own."""
    return PAGES / f"{node}.md" if language == "en" else PAGES / node / f"{language}.md"


def read_page(node: str, language: str = "en") -> str:
    return page_file(node, language).read_text(encoding="utf-8")


def with_tables(page: str, definition: dict[str, Any], ids: dict[str, Any], language: str) -> str:
    """The page, its tables of inputs and outputs by the definition. ``ids``: the inputs' names in a prompt, by key.

    Raises ValueError where a table is missing, is there twice, or is there with nothing to fill it.
    """
    an_input, an_output, meaning = HEADS[language]
    inputs = {
        f"`{given['name']}`" + (f" (`{ids[key]}`)" if given["name"] != ids[key] else ""): given["tooltip"]
        for key, given in definition["inputs"].items()
    }
    outputs = {output["name"]: output["tooltip"] for output in definition["outputs"].values()}
    for head, rows in ((an_input, inputs), (an_output, outputs)):
        table = f"| {head} | {meaning} |\n| --- | --- |\n" + "".join(f"| {k} | {v} |\n" for k, v in rows.items())
        there = re.findall(rf"^\| {head} \| {meaning} \|\n(?:\|.*\n)+", page, flags=re.MULTILINE)
        if len(there) != bool(rows):
            raise ValueError(f"{language}: {len(there)} tables of the kind '{head}' on a page, not {bool(rows):d}")
        page = page.replace(there[0], table) if rows else page
    return page


def ids_of(definition: dict[str, Any]) -> dict[str, str]:
    return {key: given["name"] for key, given in definition["inputs"].items()}


def outline(page: str) -> list[str]:
    """What a page has whatever its language: its headings, the rows of its tables, list items, and pictures."""
    kinds = []
    for line in page.splitlines():
        if line.startswith("#"):
            kinds.append(line.split()[0])
        elif line.startswith("|"):
            kinds.append(f"row of {line.count(' | ') + 1}")
        elif line.startswith("- "):
            kinds.append("item")
        elif picture := PICTURE.match(line):
            kinds.append(picture[2])
    return kinds


def numbers(page: str) -> list[str]:
    """The numbers of a page, in order of size. Separators differ between languages, and are left out."""
    return sorted(re.findall(r"\d+", re.sub(r"(?<=\d)[.,\u00a0\u202f](?=\d)", "", page)))


def sentences(page: str) -> set[str]:
    """The paragraphs, list items and cells of a page in which something is said, each in one line."""
    blocks = re.split(r"\n\n|\n(?=- |\|)", page)
    parts = (cell for block in blocks for cell in (block.split(" | ") if block.startswith("|") else [block]))
    said = {" ".join(part.strip("| ").split()) for part in parts}
    return {text for text in said if len(re.sub(r"`[^`]*`|[^a-zA-Z]", "", text)) > 25}


@pytest.fixture(scope="module", autouse=True)
def write_if_asked(definitions: dict[str, Any]) -> None:
    if os.environ.get("DNG_WRITE_LOCALES"):
        for language in HEADS:
            path = LOCALES / language / "nodeDefs.json"
            content = definitions if language == "en" else filled(definitions, read(language))
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            for node, definition in content.items():
                page = with_tables(read_page(node, language), definition, ids_of(definitions[node]), language)
                page_file(node, language).write_text(page, encoding="utf-8")


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


@languages
def test_no_text_holds_what_the_front_end_would_read_as_syntax(language):
    assert {path: text for path, text in texts(read(language)).items() if READ_BY_VUE.search(text)} == {}


def test_comfyui_serves_the_translations(comfyui, tmp_path, monkeypatch):
    """ComfyUI's own reader finds the files where a pack has them."""
    folder_paths = importlib.import_module("folder_paths")
    manager = importlib.import_module("app.custom_node_manager")
    (tmp_path / "pack").symlink_to(ROOT, target_is_directory=True)
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda kind: [str(tmp_path)])
    translations = manager.CustomNodeManager().build_translations()
    for language in HEADS:
        assert translations[language]["nodeDefs"] == read(language)


@languages
def test_every_node_has_a_help_page_with_its_inputs_and_outputs(definitions, language):
    """The tables of a page say what the tooltips say, in the same language."""
    for node, definition in read(language).items():
        page = read_page(node, language)
        assert page.startswith(f"# {definition['display_name']}\n"), node
        assert with_tables(page, definition, ids_of(definitions[node]), language) == page, f"{node}, {language}"


def test_no_help_page_is_left_without_its_node(definitions):
    assert {path.stem for path in PAGES.glob("*.md")} == set(definitions)
    assert set(PAGES.glob("*/*.md")) == {page_file(node, other) for node in definitions for other in LANGUAGES}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translated_page_has_all_that_the_english_one_has(definitions, language):
    for node in definitions:
        english, other = read_page(node), read_page(node, language)
        assert outline(other) == outline(english), node
        assert numbers(other) == numbers(english), node
        assert sentences(other) & sentences(english) == set(), node


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_calls_nodes_by_the_names_that_it_shows(definitions, language):
    english = {node: definition["display_name"] for node, definition in definitions.items()}
    shown = {definition["display_name"] for definition in read(language).values()}
    others = {name for name in english.values() if not any(name in other for other in shown)}
    assert len(others) > 10
    for node, definition in read(language).items():
        text = " ".join([*texts(definition).values(), read_page(node, language)])
        assert {name for name in others if name in text} == set(), node


@languages
def test_every_node_shows_a_picture_that_is_there_and_small(definitions, language):
    for node in definitions:
        shown = PICTURE.findall(read_page(node, language))
        assert shown or node in DEV_ONLY, node
        for said, name in shown:
            assert len(said) >= 10, name
            picture = PAGES / name  # on a page in PAGES/NODE/, too: the front end looks for pictures there
            assert picture.stat().st_size <= LARGEST_PICTURE, name
            Image.open(picture).verify()


def test_no_picture_is_left_without_a_page(definitions):
    shown = {name for node in definitions for _, name in PICTURE.findall(read_page(node))}
    assert {f"images/{path.name}" for path in (PAGES / "images").iterdir()} == shown


@languages
def test_pages_of_nodes_with_presets_give_their_values(definitions, language):
    for node, definition in definitions.items():
        page = read_page(node, language)
        for name, s in PRESETS.items() if "settings" in definition["inputs"] else ():
            values = (s.guidance_scale, s.prior, s.temperature, s.offset)
            cells = " | ".join([name, *(f"{n:g}" for n in values), s.offset_form, f"{s.p_max:g} | {s.max_scale:g}"])
            assert f"| {cells} |" in page, f"{node}, {language}: {name}"


def test_the_gallery_shows_every_node_as_it_first_appears(definitions):
    """The pictures are those that tests/browser/test_first_look.py takes."""
    folder = ROOT / "docs" / "images" / "nodes"
    gallery = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    wanted = {*definitions, "KSamplerDNG_nodes_2"}
    assert {path.stem for path in folder.iterdir()} == wanted
    assert {name for _, name in PICTURE.findall(gallery)} == {f"images/nodes/{name}.png" for name in wanted}
    assert max(Image.open(path).height for path in folder.iterdir()) <= TALLEST_PICTURE
    assert sum(path.stat().st_size for path in folder.iterdir()) <= LARGEST_GALLERY


def test_links_and_pictures_of_the_guides_are_there():
    guides = list((ROOT / "docs").glob("*.md"))
    assert len(guides) >= 2
    for guide in guides:
        for name in re.findall(r"\]\(([^):#]+)\)", guide.read_text(encoding="utf-8")):
            assert (guide.parent / name).exists(), f"{guide.name}: {name}"
