"""The real front end in a headless Chromium, with a real ComfyUI behind it.

Skipped, with the reason, where a Chromium is missing; where DNG_BROWSER names one, they fail instead. DNG_SCREENSHOTS
names a folder to keep screenshots in; those of docs/in-the-browser.md come from there.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dng_core.headless.browser import find_browser
from dng_core.headless.server import PACK_NAME, Server

LOAD_SECONDS = 300
VIEWPORT = {"width": 1500, "height": 1000}
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
)
# Older front ends have no `isGraphReady`.
READY = """() => (window.app?.isGraphReady ?? window.app?.graph)
  && window.LiteGraph?.registered_node_types.KSamplerDNG"""
LOAD = """async ([graph, name]) => {
  await app.loadGraphData(graph, true, true, name);
  await new Promise((resolve) => setTimeout(resolve, 500));
}"""
RUN = """() => new Promise((resolve) => {
  for (const status of ["execution_success", "execution_error"])
    app.api.addEventListener(status, ({ detail }) => resolve([status, detail]), { once: true });
  app.queuePrompt(0);
})"""
NODES_2 = "(on) => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
LOOK_AT = """([kinds, scale]) => {
  const nodes = app.graph.nodes.filter(({ type }) => kinds.includes(type));
  const [x, y] = [0, 1].map((axis) => Math.min(...nodes.map(({ pos }) => pos[axis])));
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [150 / scale - x, 120 / scale - y];
  app.canvas.draw(true, true);
}"""
ALONE = """([name, selected]) => {
  const last = app.graph.last_node_id;
  app.graph.clear();
  app.graph.last_node_id = last;  // the front end remembers widgets' values by the node's number and the widget's name
  const node = LiteGraph.createNode(name);
  app.graph.add(node);
  node.pos = [300, 120];
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [0, 0];
  app.canvas.draw(true, true);
  if (selected) app.canvas.selectNode(node);
  else app.canvas.deselectAll();
}"""
# Front ends after 1.47.12 call the page by the second name.
HELP = ".node-help-content :is(.markdown-content, .comfy-markdown-content)"
NO_BROWSER = (
    "there is no browser on this machine: install a Chromium (on Debian by `apt install chromium`), or name a Chrome "
    "or Edge in DNG_BROWSER"
)
WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"


class Frontend:
    """A tab with ComfyUI open, what its console said, and the front end's own ways to do things."""

    def __init__(self, context: Any, server: Server) -> None:
        self.server = server
        self.tab = context.new_page()
        self.errors: list[str] = []
        self.failed: list[str] = []
        self.tab.set_default_timeout(LOAD_SECONDS * 1000)
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("console", self._heard)
        self.tab.on("response", self._answered)
        self.open()

    def open(self) -> None:
        """Load the page, for the first time or again, and close the template browser that greets a new user."""
        self.tab.goto(self.server.url, wait_until="domcontentloaded")
        self.tab.wait_for_function(READY, timeout=LOAD_SECONDS * 1000)
        self.tab.wait_for_timeout(2000)
        self.tab.keyboard.press("Escape")

    def load(self, name: str, graph: dict[str, Any] | None = None) -> None:
        """Open a workflow of this project, or the given graph under its name."""
        self.tab.evaluate(LOAD, [graph or read(WORKFLOWS / f"{name}.json"), name])

    def alone(self, name: str, selected: bool = False) -> None:
        """Put a new node of this type into an empty graph."""
        self.tab.evaluate(ALONE, [name, selected])

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Close the template browser that greets a new user, which on a busy machine opens late, when it comes."""
        greeting = self.tab.get_by_test_id("dialog-overlay")
        self.tab.add_locator_handler(greeting, lambda: self.tab.keyboard.press("Escape"))
        yield
        self.tab.remove_locator_handler(greeting)

    def graph(self) -> dict[str, Any]:
        """The graph as the front end would save it."""
        return dict(self.tab.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))"))

    def prompt(self) -> dict[str, Any]:
        """The API form of the graph, as the front end would send it or export it."""
        return dict(self.tab.evaluate("async () => JSON.parse(JSON.stringify((await app.graphToPrompt()).output))"))

    def get(self, path: str) -> Any:
        """What the server answers the page, as JSON."""
        return self.tab.evaluate("(path) => fetch(path).then((answer) => answer.json())", path)

    def run(self) -> None:
        """Queue the graph, and wait until it has run without an error."""
        status, detail = self.tab.evaluate(RUN)
        assert status == "execution_success", detail

    def picture(self, name: str) -> None:
        """Keep a screenshot, where they are asked for."""
        if folder := os.environ.get("DNG_SCREENSHOTS"):
            self.tab.screenshot(path=Path(folder) / f"{name}.png")

    def look_at(self, *kinds: str, scale: float = 1.0) -> None:
        """Bring the nodes of these types into view, the first at the top left: what is out of sight is not drawn."""
        self.tab.evaluate(LOOK_AT, [list(kinds), scale])
        self.tab.wait_for_timeout(500)

    def _heard(self, message: Any) -> None:
        # A request that fails is in `failed`, with its address.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.errors.append(message.text)

    def _answered(self, response: Any) -> None:
        if response.status >= 400 and PACK_NAME in response.url:
            self.failed.append(f"{response.status} {response.url}")


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium, closed with the tests of a file: while it is open, Playwright's event loop bars asyncio.run."""
    executable = find_browser()
    if executable is None:
        pytest.skip(NO_BROWSER)
    if shutil.which(executable) is None:
        pytest.fail(f"DNG_BROWSER names {executable}, which is no program on this machine")
    try:
        import playwright.sync_api as api
    except ImportError:
        missing = pytest.fail if os.environ.get("DNG_BROWSER") else pytest.skip
        missing("there is a Chromium, but no Playwright to drive it: pip install playwright")
    with api.sync_playwright() as playwright:
        # The driver's sandbox of its own sessions must not see a proxy set for the internet.
        environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        chromium = playwright.chromium.launch(executable_path=executable, args=list(ARGUMENTS), env=environment)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def frontend(browser: Any, comfyui_server: Server) -> Iterator[Frontend]:
    """A fresh browser profile with ComfyUI open in it."""
    context = browser.new_context(viewport=VIEWPORT)
    yield Frontend(context, comfyui_server)
    context.close()


@pytest.fixture(scope="module")
def definitions(frontend: Frontend) -> dict[str, Any]:
    """The nodes of this pack, as ComfyUI describes them to the front end."""
    everything = frontend.get("/object_info")
    return {name: node for name, node in everything.items() if node["python_module"].endswith(PACK_NAME)}
