"""The templates run in the browser, small: each is queued, finishes, and its outputs appear on its nodes."""

import re
from pathlib import Path
from typing import Any

import pytest

from dng_core.headless.server import PACK_NAME, Server

from .conftest import LOAD_SECONDS, NODES_2, READY, VIEWPORT, WORKFLOWS, Frontend, read
from .small_checkpoint import write_small_checkpoint

# No small checkpoint stands for these here; tests/nodes/test_templates.py runs them node by node.
LARGE = {"sdxl_ksampler", "z_image_turbo_cfg_1", "wan_2_2_two_stages"}
TEMPLATES = sorted({path.stem for path in WORKFLOWS.glob("*.json")} - LARGE)
FIRST = "mnist_class_removal"
SMALL = {
    "DNGEmptyPixelLatent": {"batch_size": 2},
    "EmptyLatentImage": {"width": 64, "height": 64, "batch_size": 2},
    "KSampler": {"steps": 4},
    "KSamplerDNG": {"steps": 4},
}
KINDS = ["SaveImage", "PreviewAny", "DNGPlotTrace", "DNGCompare"]
SHRINK = """(sizes) => {
  for (const node of app.graph.nodes)
    for (const widget of node.widgets ?? [])
      widget.value = sizes[node.type]?.[widget.name] ?? widget.value;
}"""
FIT = "() => app.extensionManager.command.execute('Comfy.Canvas.FitView')"
SHOWN = """async (kinds) => {
  const shown = () => app.graph.nodes
    .filter(({ id, type }) => kinds.includes(type) && app.nodeOutputs[id])
    .map((node) => [node.type, app.nodeOutputs[node.id].images
      ? node.imgs?.[0]?.naturalWidth ?? 0
      : Math.max(...node.widgets.map(({ value }) => String(value).length))]);
  for (let wait = 0; wait < 50 && shown().some(([, size]) => !size); wait++)
    await new Promise((resolve) => setTimeout(resolve, 100));
  return shown();
}"""


@pytest.fixture(scope="module")
def checkpoint(comfyui: Any, checkpoints: Path) -> str:
    """A small checkpoint under the name that the Stable Diffusion templates ask for."""
    prompt = read(WORKFLOWS / "api" / "stable_diffusion_ksampler.json")
    (name,) = {node["inputs"]["ckpt_name"] for node in prompt.values() if "ckpt_name" in node["inputs"]}
    write_small_checkpoint(checkpoints / name)
    return name


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_queued_finishes_and_shows_its_outputs(checkpoint: str, frontend: Frontend, name: str) -> None:
    frontend.load(name)
    frontend.tab.evaluate(SHRINK, SMALL)
    frontend.tab.evaluate(FIT)
    frontend.run()
    frontend.tab.evaluate(FIT)
    shown = frontend.tab.evaluate(SHOWN, KINDS)
    frontend.picture(f"template_{name}")
    expected = sorted(node["type"] for node in read(WORKFLOWS / f"{name}.json")["nodes"] if node["type"] in KINDS)
    assert expected
    assert sorted(kind for kind, _ in shown) == expected
    assert all(size > 28 for _, size in shown), shown


@pytest.mark.parametrize(
    ("way", "nodes_2"), [("link", False), ("template browser", False), ("template browser", True)]
)
def test_two_clicks_lead_to_a_finished_picture(browser: Any, comfyui_server: Server, way: str, nodes_2: bool) -> None:
    """From the README's link, or from the pack's page in the template browser, in a browser that never opened ComfyUI.

    The template is made smaller on its way.
    """
    graph = read(WORKFLOWS / f"{FIRST}.json")
    for node in graph["nodes"]:
        if node["type"] == "DNGEmptyPixelLatent":
            node["widgets_values"] = [2]
        if node["type"].startswith("KSampler"):
            node["widgets_values"][2] = 4
    context = browser.new_context(viewport=VIEWPORT)
    tab = context.new_page()
    tab.set_default_timeout(LOAD_SECONDS * 1000)
    tab.route(f"**/workflow_templates/{PACK_NAME}/{FIRST}.json", lambda route: route.fulfill(json=graph))
    link = f"/?template={FIRST}&source={PACK_NAME}"
    tab.goto(comfyui_server.url + (link if way == "link" else ""), wait_until="domcontentloaded")
    tab.wait_for_function(READY)
    tab.evaluate(NODES_2, nodes_2)
    try:
        if way == "template browser":
            tab.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
            tab.get_by_text(PACK_NAME, exact=True).click()
            tab.get_by_test_id(f"template-workflow-{FIRST}").click()
        tab.wait_for_function("(count) => window.app?.graph?.nodes.length === count", arg=len(graph["nodes"]))
        tab.get_by_test_id("queue-button").click()
        saved = "() => app.graph.nodes.some(({ id, type }) => type === 'SaveImage' && app.nodeOutputs[id]?.images)"
        tab.wait_for_function(saved)
        assert tab.evaluate("() => LiteGraph.vueNodesMode") == nodes_2
    finally:
        tab.evaluate(NODES_2, False)
        context.close()


def test_the_readmes_link_opens_the_template() -> None:
    """The link names the address at which ComfyUI listens by default, and the folder that the README's clone makes."""
    readme = (WORKFLOWS.parent / "README.md").read_text(encoding="utf-8")
    (folder,) = re.findall(r"git clone \S+ \S*custom_nodes/(\S+)", readme)
    assert f"(http://127.0.0.1:8188/?template={FIRST}&source={folder})" in readme
