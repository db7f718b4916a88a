"""The subgraph blueprints in the browser: the node search finds and inserts them, and what is sent then runs."""

import re
from pathlib import Path
from typing import Any

import pytest

from .conftest import Frontend

FOLDER = Path(__file__).resolve().parents[2] / "subgraphs"
AVOID, AVOID_AT_CFG_1 = "Avoid a thing (DNG)", "Avoid a thing at cfg 1 (DNG)"
EXPOSED = {
    AVOID: {
        "model", "clip", "positive", "latent_image", "what_to_avoid", "prior", "guidance_scale", "seed", "steps", "cfg",
        "sampler_name", "scheduler",
    },
    AVOID_AT_CFG_1: {
        "model", "clip", "latent_image", "prompt", "what_to_avoid", "prior", "guidance_scale", "seed", "steps",
        "sampler_name", "scheduler",
    },
}  # fmt: skip
EMPTY_PLACE = 700, 500
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
  if (slot(blueprint, "positive") >= 0) {
    const prompt = add("CLIPTextEncode", 0, 200);
    set(prompt, { text: "a street" });
    book.connect(1, prompt, slot(prompt, "clip"));
    prompt.connect(0, blueprint, slot(blueprint, "positive"));
  }
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


def insert(frontend: Frontend, name: str) -> None:
    """As a user does: double-click the canvas, type the name, and take the first that is found."""
    tab = frontend.tab
    tab.evaluate("() => app.graph.clear()")
    tab.mouse.dblclick(*EMPTY_PLACE)
    tab.locator("input[role=combobox], [role=dialog] input").first.wait_for()
    tab.keyboard.type(name)
    tab.locator("[role=option]").get_by_text(re.compile(f"^{re.escape(name)}$")).first.wait_for()
    frontend.picture(f"search_{name}")
    tab.keyboard.press("Enter")
    tab.wait_for_function("() => app.graph.nodes.length === 1")
    tab.wait_for_timeout(500)
    tab.mouse.click(*EMPTY_PLACE)  # the new node follows the mouse until it is put down
    tab.wait_for_timeout(500)


def test_all_blueprints_are_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(EXPOSED)


@pytest.mark.parametrize("name", EXPOSED)
def test_a_blueprint_can_be_inserted_by_its_name_and_runs(frontend: Frontend, name: str) -> None:
    insert(frontend, name)
    title, inputs = frontend.tab.evaluate(
        "() => app.graph.nodes.map((n) => [n.title, n.inputs.map((i) => i.name)])[0]"
    )
    assert title == name
    assert set(inputs) == EXPOSED[name]

    values: dict[str, Any] = {"what_to_avoid": "night", "steps": 3, "seed": 5, "prior": 0.3, "guidance_scale": 4}
    values |= {"prompt": "a street"} if name == AVOID_AT_CFG_1 else {"cfg": 3}
    saver = frontend.tab.evaluate(WIRE, values)
    frontend.picture(f"blueprint_{name}")
    frontend.run()
    assert frontend.tab.evaluate("(id) => app.nodeOutputs[id].images.length", saver) == 2


@pytest.mark.parametrize("name", EXPOSED)
def test_what_a_blueprint_exposes_reaches_its_nodes(frontend: Frontend, name: str) -> None:
    """And what it settles by itself is sent as it says: the unconditional, or cfg 1 and the joint prompt."""
    insert(frontend, name)
    values = {"what_to_avoid": "night", "steps": 3, "seed": 5, "prior": 0.3, "guidance_scale": 4}
    frontend.tab.evaluate(WIRE, values | ({"prompt": "a street"} if name == AVOID_AT_CFG_1 else {"cfg": 3}))
    prompt = frontend.prompt()
    (sampler,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "KSamplerDNG")
    assert {key: sampler[key] for key in ("steps", "seed", "settings")} == {"steps": 3, "seed": 5, "settings": "exact"}
    assert (sampler["settings.prior"], sampler["settings.guidance_scale"]) == (0.3, 4)
    positive, negative = (prompt[sampler[wire][0]] for wire in ("positive", "negative"))
    if name == AVOID:
        assert sampler["cfg"] == 3
        assert positive["inputs"]["text"] == "a street"
        assert negative["inputs"]["text"] == "night"
        assert prompt[sampler["unconditional"][0]]["inputs"]["text"] == ""
    else:
        assert sampler["cfg"] == 1
        assert "unconditional" not in sampler
        assert positive is negative
        assert (sampler["positive"][1], sampler["negative"][1]) == (0, 1)
        assert positive["class_type"] == "DNGJointNegative"
        assert (positive["inputs"]["positive_text"], positive["inputs"]["undesired_text"]) == ("a street", "night")
