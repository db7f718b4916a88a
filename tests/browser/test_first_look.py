"""How each node looks when it is added: small, in both renderers. The pictures of docs/gallery.md are made here.

`DNG_SCREENSHOTS=docs/images python3 -m dng_core test tests/browser/test_first_look.py` makes them again.
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .conftest import NODES_2, Frontend

TALLEST = 600
MARGIN = 8  # of the canvas around a node, in pixels
COLOURS = 64  # of a picture: a node has few, and the edges of its letters shades between them
BOTH = ("KSamplerDNG",)  # nodes of which there is a picture from Nodes 2.0 too
DRAW = "() => app.canvas.draw(true, true)"
DIALOG = "[role=dialog]:visible"
BADGES = ("Comfy.NodeBadge.NodeSourceBadgeMode", "Comfy.NodeBadge.NodeLifeCycleBadgeMode")
"""What is shown above a node, half of it within a picture: the folder of the pack (here the tests'), and "BETA"."""
GET = "(name) => app.extensionManager.setting.get(name)"
SET = "([name, value]) => app.extensionManager.setting.set(name, value)"
BOX = """(vue) => {
  const [node] = app.graph.nodes;
  if (vue) {
    const { x, y, width, height } = document.querySelector(`[data-node-id="${node.id}"]`).getBoundingClientRect();
    return { x, y, width, height };
  }
  const { left, top } = app.canvas.canvas.getBoundingClientRect();
  const title = LiteGraph.NODE_TITLE_HEIGHT;
  return { x: left + node.pos[0], y: top + node.pos[1] - title, width: node.size[0], height: node.size[1] + title };
}"""


def keep(frontend: Frontend, name: str, box: dict[str, float]) -> None:
    """Keep a picture of what is in the box, where pictures are asked for."""
    if folder := os.environ.get("DNG_SCREENSHOTS"):
        left, top = (round(box[edge]) - MARGIN for edge in ("x", "y"))
        width, height = (round(box[side]) + 2 * MARGIN for side in ("width", "height"))
        shot = undisturbed(frontend, {"x": left, "y": top, "width": width, "height": height})
        path = Path(folder) / "nodes" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(io.BytesIO(shot)).convert("RGB").quantize(COLOURS).save(path, optimize=True)


def undisturbed(frontend: Frontend, clip: dict[str, int]) -> bytes:
    """A screenshot without a dialog before it: the one that greets a new user may come late."""
    while True:
        shot: bytes = frontend.tab.screenshot(clip=clip)
        if not frontend.tab.locator(DIALOG).count():
            return shot
        frontend.tab.keyboard.press("Escape")
        frontend.tab.wait_for_timeout(500)


@pytest.fixture
def no_badges(frontend: Frontend) -> Iterator[None]:
    shown = {name: frontend.tab.evaluate(GET, name) for name in BADGES}
    for name in BADGES:
        frontend.tab.evaluate(SET, [name, "None"])
    yield
    for name, value in shown.items():
        frontend.tab.evaluate(SET, [name, value])


@pytest.mark.usefixtures("no_badges")
@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "Nodes 2.0"])
def test_no_node_is_tall_when_it_first_appears(frontend: Frontend, definitions: dict[str, Any], nodes_2: bool) -> None:
    frontend.tab.evaluate(NODES_2, nodes_2)
    heights = {}
    for name in definitions:
        frontend.alone(name)
        for _ in range(2):  # a text area is put in its place by the second drawing
            frontend.tab.evaluate(DRAW)
            frontend.tab.wait_for_timeout(300)
        box = frontend.tab.evaluate(BOX, nodes_2)
        heights[name] = box["height"]
        if not nodes_2 or name in BOTH:
            keep(frontend, f"{name}_nodes_2" if nodes_2 else name, box)
    frontend.tab.evaluate(NODES_2, False)
    assert len(heights) > 10
    assert {name: height for name, height in heights.items() if not 40 < height <= TALLEST} == {}
