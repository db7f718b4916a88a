"""The front end in another language: what its nodes and their help pages say there. Text is compared, not pixels."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import HELP, Frontend

LOCALES = Path(__file__).resolve().parents[2] / "locales"
LANGUAGES = sorted(folder.name for folder in LOCALES.iterdir() if folder.name != "en")  # test_frontend.py has English
UNTRANSLATED = "es"  # the front end has it, and the pack does not
LOCALE = "(language) => app.extensionManager.setting.set('Comfy.Locale', language)"
TEXTS = """() => {
  const [node] = app.graph.nodes;
  const slots = [...node.inputs, ...node.outputs].map((slot) => [slot.name, slot.localized_name]);
  return [node.title, slots, (node.widgets ?? []).map(({ name, label }) => [name, label])];
}"""


def open_help(frontend: Frontend) -> None:
    """Select a node, and open the help panel unless it is open. The front end's first workflow may come in between."""
    head, button = frontend.tab.locator(f"{HELP} h1"), frontend.tab.get_by_test_id("info-button")
    for _ in range(30):
        frontend.tab.keyboard.press("Escape")
        frontend.alone("KSamplerDNG", selected=True)
        frontend.tab.wait_for_timeout(2000)
        if head.is_visible():
            return
        if button.is_visible():
            button.click()
            frontend.tab.wait_for_timeout(3000)
    raise AssertionError("the help panel does not open")


@pytest.fixture(scope="module", params=[*LANGUAGES, UNTRANSLATED])
def language(frontend: Frontend, request: pytest.FixtureRequest) -> Iterator[str]:
    """A language that the front end is set to, with the help panel open."""
    frontend.tab.evaluate(LOCALE, request.param)
    frontend.open()
    open_help(frontend)
    yield request.param
    frontend.tab.evaluate(LOCALE, "en")


@pytest.fixture
def expected(language: str) -> dict[str, Any]:
    """The texts of the nodes that the front end should show."""
    file = LOCALES / (language if language in LANGUAGES else "en") / "nodeDefs.json"
    return dict(json.loads(file.read_text(encoding="utf-8")))


def test_nodes_show_their_names_inputs_and_outputs(
    frontend: Frontend, language: str, expected: dict[str, Any]
) -> None:
    for name, texts in expected.items():
        frontend.alone(name, selected=True)
        title, slots, widgets = frontend.tab.evaluate(TEXTS)
        known = {key: given["name"] for key, given in texts["inputs"].items()}
        outputs = {output["name"] for output in texts["outputs"].values()}
        assert title == texts["display_name"]
        shown = dict(slots) | dict(widgets)
        inputs = {key: label for key, label in shown.items() if key.replace(".", "_") in known}
        assert {key: label for key, label in inputs.items() if label != known[key.replace(".", "_")]} == {}, name
        assert len(inputs) >= len([key for key in known if not key.startswith("settings_")]), name
        if language in LANGUAGES:  # the front end itself names the outputs that are called by their types
            assert outputs <= set(shown.values()), name
    frontend.alone("KSamplerDNG", selected=True)
    frontend.tab.wait_for_timeout(1000)
    frontend.picture(f"language_{language}")


def test_the_help_panel_shows_the_pages(frontend: Frontend, expected: dict[str, Any]) -> None:
    for name, texts in expected.items():
        frontend.alone(name, selected=True)
        frontend.tab.locator(f"{HELP} h1").get_by_text(texts["display_name"], exact=True).wait_for()
        page = frontend.tab.locator(HELP).inner_text()
        said = [text["tooltip"] for kind in ("inputs", "outputs") for text in texts[kind].values()]
        assert [text for text in said if text.replace("`", "") not in page] == [], name
        assert "**" not in page, f"{name}: Markdown that was not understood"
        for picture in frontend.tab.locator(f"{HELP} img").all():
            assert picture.evaluate("(image) => image.decode().then(() => image.naturalWidth)") > 100, name


def test_a_tooltip_is_shown(frontend: Frontend, expected: dict[str, Any]) -> None:
    """That of an input which appears by a choice, and that of one which is always there."""
    for widget in ("settings.prior", "steps"):
        frontend.alone("KSamplerDNG", selected=True)
        frontend.tab.wait_for_timeout(500)
        x, y = frontend.tab.evaluate(
            """(name) => {
              const [node] = app.graph.nodes;
              const { left, top } = app.canvas.canvas.getBoundingClientRect();
              const { last_y } = node.widgets.find((widget) => widget.name === name);
              return [left + node.pos[0] + node.size[0] / 2, top + node.pos[1] + last_y + 10];
            }""",
            widget,
        )
        frontend.tab.mouse.move(x - 5, y)
        frontend.tab.mouse.move(x, y, steps=3)
        said = expected["KSamplerDNG"]["inputs"][widget.replace(".", "_")]["tooltip"]
        frontend.tab.locator(".node-tooltip").get_by_text(said).wait_for(timeout=20_000)
