"""The subgraph blueprints in the browser: the node library finds and inserts them, and what is sent then runs."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Frontend

FOLDER = Path(__file__).resolve().parents[2] / "subgraphs"
AVOID, AVOID_AT_CFG_1 = "Avoid a thing (DNG)", "Avoid a thing at cfg 1 (DNG)"
SAMPLING = {"prompt", "what_to_avoid", "prior", "guidance_scale", "seed", "steps", "sampler_name", "scheduler"}
AT_CFG_1 = {"model", "clip", "latent_image", *SAMPLING}
EXPOSED = {AVOID: {*AT_CFG_1, "cfg"}, AVOID_AT_CFG_1: AT_CFG_1}
EMPTY_PLACE = 700, 500
SEARCH = re.compile(r"^Search( Nodes)?\.\.\.$")  # the search field's text in the pinned front end and in 1.58
# Around the one node of the graph: the picture book, and what saves its pictures.
WIRE = """(values) => {
  const [blueprint] = app.graph.nodes;
  blueprint.pos = [500, 0];
  const add = (type, x, y) => {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    node.pos = [x, y];
    return node;
  };
  const slot = (node, name) => node.inputs.findIndex((input) => input.name === name);
  const set = (node, wanted) => {
    for (const [name, value] of Object.entries(wanted)) node.widgets.find((w) => w.name === name).value = value;
  };
  const book = add("DNGLoadPictureBook", 0, 0);
  book.connect(0, blueprint, slot(blueprint, "model"));
  book.connect(1, blueprint, slot(blueprint, "clip"));
  const latent = add("EmptyLatentImage", 0, 450);
  set(latent, { width: 64, height: 64, batch_size: 2 });
  latent.connect(0, blueprint, slot(blueprint, "latent_image"));
  set(blueprint, values);
  const decode = add("VAEDecode", 900, 0);
  blueprint.connect(0, decode, slot(decode, "samples"));
  book.connect(2, decode, slot(decode, "vae"));
  const save = add("SaveImage", 900, 150);
  decode.connect(0, save, slot(save, "images"));
  const plot = add("DNGPlotTrace", 1200, 150);
  blueprint.connect(1, plot, slot(plot, "trace"));
  return `${save.id}`;
}"""


@pytest.fixture(scope="module")
def library(frontend: Frontend) -> Iterator[Any]:
    """The node library in the sidebar, open; its search field."""
    with frontend.undisturbed():
        button = frontend.tab.get_by_label("Node Library (n)")
        button.click()
        field = frontend.tab.get_by_placeholder(SEARCH).first
        field.wait_for()
        yield field
        button.click()


def insert(frontend: Frontend, library: Any, name: str) -> None:
    """As a user does: search the library, click what is found, and click where the node is to lie."""
    tab = frontend.tab
    tab.evaluate("() => app.graph.clear()")
    library.fill(name)
    found = tab.get_by_role("treeitem").get_by_text(name, exact=True)
    found.hover()
    tab.wait_for_timeout(500)
    frontend.picture(f"library_{name}")
    found.click()
    x, y = EMPTY_PLACE
    tab.mouse.move(x - 10, y - 10)
    tab.mouse.click(x, y)
    tab.wait_for_function("() => app.graph.nodes.length === 1")


def test_all_blueprints_are_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(EXPOSED)


@pytest.mark.parametrize("name", EXPOSED)
def test_a_blueprint_from_the_library_sends_what_it_shows_and_runs(
    frontend: Frontend, library: Any, name: str
) -> None:
    """And it sends what it settles by itself: the empty prompt, or cfg 1 and the joint prompt."""
    insert(frontend, library, name)
    title, inputs = frontend.tab.evaluate(
        "() => { const [node] = app.graph.nodes; return [node.title, node.inputs.map((input) => input.name)]; }"
    )
    assert title == name
    assert set(inputs) == EXPOSED[name]

    values = {"prompt": "a street", "what_to_avoid": "night", "steps": 3, "seed": 5, "prior": 0.3, "guidance_scale": 4}
    saver = frontend.tab.evaluate(WIRE, values | ({"cfg": 3} if name == AVOID else {}))
    frontend.picture(f"blueprint_{name}")
    prompt = frontend.prompt()
    (sampler,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "KSamplerDNG")
    assert {key: sampler[key] for key in ("steps", "seed", "settings")} == {"steps": 3, "seed": 5, "settings": "exact"}
    assert (sampler["settings.prior"], sampler["settings.guidance_scale"]) == (0.3, 4)
    assert (sampler["positive"][1], sampler["negative"][1]) == (0, 1)
    positive, negative = (prompt[sampler[wire][0]] for wire in ("positive", "negative"))
    assert positive is negative and positive["class_type"] == "DNGJointNegative"
    assert (positive["inputs"]["positive_text"], positive["inputs"]["undesired_text"]) == ("a street", "night")
    if name == AVOID:
        assert sampler["cfg"] == 3
        assert prompt[sampler["unconditional"][0]]["inputs"]["text"] == ""
    else:
        assert sampler["cfg"] == 1
        assert "unconditional" not in sampler

    frontend.run()
    assert frontend.tab.evaluate("(id) => app.nodeOutputs[id].images.length", saver) == 2
