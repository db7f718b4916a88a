"""The choice `settings` in the browser: what each choice shows, in both renderers, in prompts, and after a reload."""

from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import NODES_2, Frontend

GUIDING = ("KSamplerDNG", "KSamplerAdvancedDNG", "DNGGuider", "DynamicNegativeGuidance", "DNGConcept")
EXACT = {"guidance_scale", "prior", "evidence_until"}
CUSTOM = {
    *EXACT, "temperature", "offset", "offset_form", "p_min", "p_max", "max_scale", "rule",
    "calibration",
}  # fmt: skip
CHOICES = {
    "exact": EXACT,
    "calibrated": {"calibration", *EXACT},
    "preset": {"preset"},
    "custom": CUSTOM,
    "negative_prompting": {"guidance_scale"},
    "safe_latent_diffusion": {"guidance_scale"},
}
OF_A_RUN = {
    "calibrated": {"economy"},
    "custom": {"reference", "economy"},
    "negative_prompting": {"reference"},
    "safe_latent_diffusion": {"reference"},
}
"""What the nodes that sample show beside the above."""

CHOOSE = """(choice) => { app.graph.nodes[0].widgets.find(({ name }) => name === "settings").value = choice; }"""
NESTED = """() => {
  const [{ inputs, widgets }] = app.graph.nodes;
  return [...new Set([...inputs, ...widgets].map(({ name }) => name))].filter((name) => name.startsWith("settings."));
}"""
SET = """(values) => {
  for (const widget of app.graph.nodes[0].widgets) widget.value = values[widget.name] ?? widget.value;
}"""


@pytest.fixture(params=[False, True], ids=["classic", "Nodes 2.0"])
def renderer(frontend: Frontend, request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether nodes are drawn by Nodes 2.0."""
    frontend.tab.evaluate(NODES_2, request.param)
    yield request.param
    frontend.tab.evaluate(NODES_2, False)


def shown(frontend: Frontend) -> set[str]:
    return {name.removeprefix("settings.") for name in frontend.tab.evaluate(NESTED)}


@pytest.mark.parametrize("name", GUIDING)
def test_a_node_first_shows_the_inputs_of_exact(frontend: Frontend, renderer: bool, name: str) -> None:
    frontend.alone(name)
    frontend.tab.wait_for_timeout(500)
    assert shown(frontend) == EXACT


@pytest.mark.parametrize("name", GUIDING)
def test_a_choice_shows_its_inputs_and_no_others(frontend: Frontend, renderer: bool, name: str) -> None:
    frontend.alone(name)
    for choice, inputs in CHOICES.items():
        frontend.tab.evaluate(CHOOSE, choice)
        frontend.tab.wait_for_timeout(200)
        frontend.picture(f"{choice}_{name}{'_nodes_2' if renderer else ''}")
        assert shown(frontend) == inputs | (OF_A_RUN.get(choice, set()) if name != "DNGConcept" else set())


def test_a_choice_and_its_values_are_sent_saved_and_loaded(frontend: Frontend, renderer: bool) -> None:
    """The calibration comes through a wire, and so does the prior, to a widget."""
    frontend.alone("KSamplerDNG")
    frontend.tab.evaluate(CHOOSE, "calibrated")
    frontend.tab.evaluate(SET, {"settings.guidance_scale": 2.5, "denoise": 0.5})
    frontend.tab.evaluate(
        """() => {
          const [node] = app.graph.nodes;
          for (const [kind, input] of [["DNGLoadCalibration", "calibration"], ["PrimitiveFloat", "prior"]]) {
            const origin = LiteGraph.createNode(kind);
            app.graph.add(origin);
            origin.connect(0, node, node.inputs.findIndex(({ name }) => name === `settings.${input}`));
          }
        }"""
    )

    def sent() -> dict[str, Any]:
        (node,) = (node for node in frontend.prompt().values() if node["class_type"] == "KSamplerDNG")
        wanted = {k: v for k, v in node["inputs"].items() if k.startswith("settings") or k == "denoise"}
        return {name: value[1] if isinstance(value, list) else value for name, value in wanted.items()}

    expected = {
        "denoise": 0.5, "settings": "calibrated", "settings.calibration": 0, "settings.guidance_scale": 2.5,
        "settings.prior": 0, "settings.evidence_until": 0.25, "settings.economy": "off",
    }  # fmt: skip
    assert sent() == expected
    saved = frontend.graph()
    frontend.load("again", saved)
    assert sent() == expected
