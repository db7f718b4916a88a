"""The pack in ComfyUI's own front end: it loads, its nodes and help are there, and graphs are what the files say."""

from pathlib import Path
from typing import Any

import pytest

from dng_core.headless.server import PACK_NAME
from dng_core.headless.workflow import load_workflow

from .conftest import HELP, NODES_2, WORKFLOWS, Frontend, read

TEMPLATES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
# Said by the front end itself while it starts, with or without this pack's script: the latter where it opens its
# default workflow, whose models it may not look up.
ITS_OWN = ("ComfyApp graph accessed before initialization", "https://huggingface.co")
TITLE_HEIGHT = 30
NOTES = ("MarkdownNote", "Note")
BOXES = """() => [...document.querySelectorAll("[data-node-id]")].map((element) => {
  const { x, y, right, bottom } = element.getBoundingClientRect();
  return [element.dataset.nodeId, x, y, right, bottom];
}).filter(([, x, , right]) => right > x)"""

WITHOUT_ROOT = """() => {
  const node = app.graph.nodes.find(({ type }) => type === "KSamplerDNG");
  const values = [[[0.1, 0.2]], [[0.3, 0.4]]];
  const message = { node: `${node.id}`, workflow: app.graph.id, start: 0, steps: 2, images: 2, done: true };
  const send = (detail) => app.api.dispatchEvent(new CustomEvent("dynamic_negative_guidance.chart", { detail }));
  for (const [name, value] of [["rootGraph", undefined], ["graph", app.graph]])
    Object.defineProperty(app, name, { value, configurable: true });
  Object.defineProperty(app.graph, "rootGraph", { value: undefined, configurable: true });
  send({ ...message, posterior: values, scale: values, looked: [[true]] });
  const drawn = Object.keys(node.properties.dng_chart ?? {}).filter((key) => ["posterior", "scale"].includes(key));
  Object.defineProperty(app, "graph", { value: undefined, configurable: true });
  send({ ...message, posterior: values, scale: values, looked: [[true]] });
  for (const name of ["graph", "rootGraph"]) delete app[name];
  delete app.graph.rootGraph;
  return drawn;
}"""

templates = pytest.mark.parametrize("name", TEMPLATES)


def inputs_of(definition: dict[str, Any]) -> dict[str, list]:
    return {**definition["input"].get("required", {}), **definition["input"].get("optional", {})}


UNORDERED = ("links", "linkIds", "linkExtensions")  # lists whose order means nothing, and differs by front end
NONE = ("widgets_values", [])  # of a node without widgets; front end 1.58.1 leaves it out
TWICE = "widgets_values_named"  # what front end 1.58.1 saves beside widgets_values: the same values by name


def essence(graph: dict[str, Any]) -> dict[str, Any]:
    """A graph without what depends on the front end: view, version, the order of links, and what is said twice."""
    extra = {k: v for k, v in graph.get("extra", {}).items() if k not in ("ds", "frontendVersion")}
    plain: dict[str, Any] = in_order({**graph, "extra": extra})
    return plain


def in_order(value: Any, key: str = "") -> Any:
    """The same JSON with lists of links in one order, and without labels that only repeat a slot's name."""
    if isinstance(value, dict):
        said = {name: item for name, item in value.items() if name != TWICE and (name, item) != NONE}
        if said.get("label") in (said.get("name"), said.get("localized_name")):
            said.pop("label", None)
        return {name: in_order(item, name) for name, item in said.items()}
    if isinstance(value, list):
        items = [in_order(item) for item in value]
        return sorted(items, key=repr) if key in UNORDERED else items
    return value


def test_the_pack_loads_without_an_error(frontend: Frontend, definitions: dict[str, Any]) -> None:
    assert [error for error in frontend.errors if not any(own in error for own in ITS_OWN)] == []
    assert frontend.failed == []
    assert {"KSamplerDNG", "KSamplerAdvancedDNG", "DNGGuider", "DynamicNegativeGuidance"} <= set(definitions)


def test_every_node_can_be_added_and_shows_its_inputs_and_outputs(
    frontend: Frontend, definitions: dict[str, Any]
) -> None:
    frontend.tab.evaluate("() => app.graph.clear()")
    for name, definition in definitions.items():
        slots, widgets, outputs = frontend.tab.evaluate(
            """(name) => {
              const node = LiteGraph.createNode(name);
              app.graph.add(node);
              const shown = (node.widgets ?? []).map((widget) => widget.name);
              return [(node.inputs ?? []).map((input) => input.name), shown, (node.outputs ?? []).map((o) => o.name)];
            }""",
            name,
        )
        assert set(inputs_of(definition)) <= {*slots, *widgets}, name
        assert outputs == definition["output_name"], name


def test_every_input_and_output_has_a_tooltip(definitions: dict[str, Any]) -> None:
    for name, definition in definitions.items():
        for input_name, (_, *options) in inputs_of(definition).items():
            assert options and options[0].get("tooltip"), f"{name}.{input_name}"
        tooltips = definition["output_tooltips"] or [None] * len(definition["output"])
        assert all(tooltips), name


def test_a_tooltip_appears_where_the_mouse_rests(frontend: Frontend, definitions: dict[str, Any]) -> None:
    x, y = frontend.tab.evaluate(
        """async () => {
          app.graph.clear();
          const node = LiteGraph.createNode("KSamplerDNG");
          app.graph.add(node);
          node.pos = [200, 100];
          app.canvas.ds.scale = 1;
          app.canvas.ds.offset = [100, 100];
          app.canvas.draw(true, true);
          await new Promise((resolve) => setTimeout(resolve, 500));
          const prior = node.widgets.find((widget) => widget.name === "settings.prior");
          const { left, top } = app.canvas.canvas.getBoundingClientRect();
          return [left + 100 + node.pos[0] + node.size[0] / 2, top + 100 + node.pos[1] + prior.last_y + 10];
        }"""
    )
    frontend.tab.mouse.move(x - 5, y)
    frontend.tab.mouse.move(x, y, steps=3)
    (exact, *_) = inputs_of(definitions["KSamplerDNG"])["settings"][1]["options"]
    said = exact["inputs"]["optional"]["prior"][1]["tooltip"]
    frontend.tab.get_by_text(said).first.wait_for(timeout=60_000)
    frontend.picture("tooltip")


def test_every_node_has_a_help_page_that_the_help_panel_shows(frontend: Frontend, definitions: dict[str, Any]) -> None:
    """Opened once, the panel follows what is selected."""
    tab = frontend.tab
    frontend.alone("KSamplerDNG", selected=True)
    tab.get_by_test_id("info-button").click()
    tab.locator(f"{HELP} h1").wait_for()
    tab.wait_for_timeout(1000)
    frontend.picture("help")
    for name, definition in definitions.items():
        frontend.alone(name, selected=True)
        tab.locator(f"{HELP} h1").get_by_text(definition["display_name"], exact=True).wait_for()
        for picture in tab.locator(f"{HELP} img").all():
            assert picture.evaluate("(image) => image.decode().then(() => image.naturalWidth)") > 100, name


def in_template_browser(frontend: Frontend, name: str) -> Any:
    """The card of a template, in the template browser with the pack's templates chosen.

    The dialog about the missing models of the template before may come late, and then lies over the browser. Escape
    closes what is on top, and the browser is opened again.
    """
    from playwright.sync_api import TimeoutError as NotInTime  # not at the top: without Playwright, tests are skipped

    tab, card = frontend.tab, frontend.tab.get_by_test_id(f"template-workflow-{name}")
    for patience in (30_000, 60_000, None):
        tab.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        try:
            tab.get_by_text(PACK_NAME).last.click(timeout=patience)
            card.wait_for(timeout=patience)
            card.click(trial=True, timeout=patience)
            return card
        except NotInTime:
            for _ in range(3):
                tab.keyboard.press("Escape")
                tab.wait_for_timeout(500)
    raise AssertionError(f"{name} is not in the template browser")


@templates
def test_a_template_opens_from_the_template_browser_with_its_picture(frontend: Frontend, name: str) -> None:
    tab = frontend.tab
    tab.evaluate("() => app.graph.clear()")
    card = in_template_browser(frontend, name)
    card.locator("img").first.wait_for()
    assert card.locator("img").first.evaluate("(image) => image.decode().then(() => image.naturalWidth)") >= 600
    frontend.picture("template_browser")
    card.click()
    expected = sorted(node["type"] for node in read(WORKFLOWS / f"{name}.json")["nodes"])
    tab.wait_for_function("(count) => app.graph.nodes.length === count", arg=len(expected))
    assert sorted(node["type"] for node in frontend.graph()["nodes"]) == expected
    missing = "() => app.graph.nodes.map((node) => node.type).filter((type) => !LiteGraph.registered_node_types[type])"
    assert tab.evaluate(missing) == []


@templates
def test_a_graph_saved_from_the_browser_is_the_file(frontend: Frontend, name: str) -> None:
    frontend.load(name)
    assert essence(frontend.graph()) == essence(read(WORKFLOWS / f"{name}.json"))


@templates
def test_the_api_form_that_the_browser_exports_is_the_file(frontend: Frontend, name: str) -> None:
    frontend.load(name)
    exported = {key: node for key, node in frontend.prompt().items() if node["class_type"] not in NOTES}
    assert exported == load_workflow(Path(WORKFLOWS / "api" / f"{name}.json"))


@templates
@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes 2.0"])
def test_no_node_covers_another(frontend: Frontend, name: str, nodes_2: bool) -> None:
    frontend.tab.evaluate(NODES_2, nodes_2)
    frontend.load(name)
    if nodes_2:
        frontend.tab.wait_for_timeout(1000)
        boxes = frontend.tab.evaluate(BOXES)
    else:
        boxes = [
            (node["id"], x, y - TITLE_HEIGHT, x + width, y + height)
            for node in frontend.graph()["nodes"]
            for (x, y), (width, height) in [(node["pos"], node["size"])]
        ]
    frontend.tab.evaluate(NODES_2, False)
    assert boxes
    for index, (node, left, top, right, bottom) in enumerate(boxes):
        for other, x0, y0, x1, y1 in boxes[index + 1 :]:
            apart = node == other or right <= x0 or x1 <= left or bottom <= y0 or y1 <= top
            assert apart, f"{node} and {other}"


def test_a_front_end_without_a_root_graph_gets_the_chart_and_no_error(frontend: Frontend) -> None:
    """Older front ends have `app.graph` alone, and graphs that know no root; before its first graph, none has any."""
    frontend.load("mnist_class_removal")
    frontend.errors.clear()
    assert frontend.tab.evaluate(WITHOUT_ROOT) == ["posterior", "scale"]
    frontend.tab.wait_for_timeout(200)
    assert frontend.errors == []


def test_swapping_a_ksampler_for_ksampler_dng_keeps_its_wires_and_settings(frontend: Frontend) -> None:
    """As in the browser: the new node beside the old, each wire moved to the input of the same name."""
    frontend.load("stable_diffusion_model_patch")
    before = next(node for node in frontend.prompt().values() if node["class_type"] == "KSampler")
    frontend.tab.evaluate(
        """() => {
          const graph = app.graph;
          const old = graph.nodes.find((node) => node.type === "KSampler");
          const swapped = LiteGraph.createNode("KSamplerDNG");
          graph.add(swapped);
          for (const input of old.inputs.filter(({ link }) => link !== null)) {
            const link = graph.getLink(input.link);
            const target = swapped.inputs.findIndex(({ name }) => name === input.name);
            graph.getNodeById(link.origin_id).connect(link.origin_slot, swapped, target);
          }
          for (const output of old.outputs) {
            const name = swapped.outputs.findIndex((candidate) => candidate.name === output.name);
            for (const id of [...(output.links ?? [])]) {
              const link = graph.getLink(id);
              swapped.connect(name, graph.getNodeById(link.target_id), link.target_slot);
            }
          }
          for (const { name, value } of old.widgets) swapped.widgets.find((w) => w.name === name).value = value;
          graph.remove(old);
        }"""
    )
    ((key, after),) = ((k, node) for k, node in frontend.prompt().items() if node["class_type"] == "KSamplerDNG")
    assert {name: after["inputs"].get(name) for name in before["inputs"]} == before["inputs"]
    decoder = next(node for node in frontend.prompt().values() if node["class_type"] == "VAEDecode")
    assert decoder["inputs"]["samples"] == [key, 0]


def test_a_file_whose_ksampler_is_renamed_keeps_its_wires_and_settings(frontend: Frontend) -> None:
    """As in an editor: only the node's type is changed in the file."""
    graph = read(WORKFLOWS / "stable_diffusion_model_patch.json")
    sampler = next(node for node in graph["nodes"] if node["type"] == "KSampler")
    frontend.load("stable_diffusion_model_patch")
    before = frontend.prompt()[str(sampler["id"])]
    sampler["type"] = "KSamplerDNG"
    frontend.load("renamed", graph)
    after = frontend.prompt()[str(sampler["id"])]
    assert after["class_type"] == "KSamplerDNG"
    assert {name: after["inputs"].get(name) for name in before["inputs"]} == before["inputs"]
