"""App mode in the browser: a template shows what it names there, runs from there, and its pictures appear."""

import json
from typing import Any

from .conftest import WORKFLOWS, Frontend, read

TEMPLATE = "picture_book_avoid"
TOGGLE = "() => app.extensionManager.command.execute('Comfy.ToggleLinear')"
SHRINK = """() => {
  const small = { steps: 3, batch_size: 2 };
  for (const node of app.graph.nodes)
    for (const widget of node.widgets ?? []) widget.value = small[widget.name] ?? widget.value;
}"""
SHOWN = """() => ["linear-outputs", "linear-center-panel"]
  .flatMap((panel) => [...document.querySelectorAll(`[data-testid=${panel}] img`)])
  .some((image) => image.naturalWidth > 28)"""
RUN_SECONDS = 300


def labels() -> list[str]:
    """What App mode calls the inputs of the template."""
    graph = read(WORKFLOWS / f"{TEMPLATE}.json")
    slots = {(str(node["id"]), slot["name"]): slot for node in graph["nodes"] for slot in node["inputs"]}
    chosen: list[Any] = [slots[node, name] for node, name in graph["extra"]["linearData"]["inputs"]]
    return [slot.get("label", slot["localized_name"]) for slot in chosen]


def test_a_template_in_app_mode_shows_its_inputs_runs_and_shows_its_pictures(frontend: Frontend) -> None:
    tab = frontend.tab
    # Since 1.58 a front end that never showed App mode explains it first, in a dialog.
    welcome = tab.get_by_test_id("coach-landing")
    with frontend.undisturbed():
        tab.add_locator_handler(welcome, lambda: tab.keyboard.press("Escape"))
        frontend.load(TEMPLATE)
        tab.evaluate(SHRINK)
        tab.evaluate(TOGGLE)
        try:
            tab.get_by_test_id("app-mode-widget-item").first.wait_for()
            shown = tab.get_by_test_id("app-mode-widget-item").all_inner_texts()
            assert [text.splitlines()[0] for text in shown] == labels()
            tab.evaluate(
                """() => {
                  window.ended = null;
                  for (const status of ["execution_success", "execution_error"])
                    app.api.addEventListener(status, () => { window.ended = status; }, { once: true });
                }"""
            )
            tab.locator("[data-testid=linear-run-button] button", has_text="Run").click()
            tab.wait_for_function("() => window.ended", timeout=RUN_SECONDS * 1000)
            assert tab.evaluate("window.ended") == "execution_success"
            tab.wait_for_function(SHOWN)
            frontend.picture("app_mode")
        finally:
            tab.evaluate(TOGGLE)
            tab.remove_locator_handler(welcome)
    prompt = json.dumps(frontend.prompt())
    assert "a street" in prompt
