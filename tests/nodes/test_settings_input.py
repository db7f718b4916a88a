"""The input `settings` of the nodes that guide: what each choice makes of its inputs, and what ComfyUI hands over."""

import importlib
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch

from dng_core.baselines import NegativePrompting, SafeLatentDiffusion
from dng_core.headless.client import run_workflow
from dng_core.headless.errors import HeadlessError
from dng_core.headless.server import Server
from dng_core.settings import PRESETS, Settings


@pytest.fixture
def concept(bench: Any) -> Any:
    """The concept of a node that gets these inputs beside its others."""

    def call(**values: Any) -> Any:
        return bench.node_inputs.concepts_from(bench.cond("0"), values)[0]

    return call


def same(settings: Any, expected: Any) -> bool:
    """The pack's classes are another copy than the tests' own."""
    return type(settings).__name__ == type(expected).__name__ and asdict(settings) == asdict(expected)


def test_without_settings_guidance_is_exact(concept):
    for values in ({}, {"settings": None}, {"settings": {"settings": "exact", "prior": None}}):
        found = concept(**values)
        assert same(found.settings, Settings())
        assert (found.reference, found.economy, found.calibration) == ("auto", "off", None)
        assert found.evidence_until == 0.25


def test_a_choice_takes_its_inputs_and_leaves_those_of_others(concept):
    given = {"prior": 0.3, "guidance_scale": 7.0, "temperature": 0.5, "economy": "auto", "preset": "CIFAR-10"}
    expected = {
        "exact": (Settings(prior=0.3, guidance_scale=7), "off"),
        "preset": (PRESETS["CIFAR-10"], "off"),
        "custom": (Settings(prior=0.3, guidance_scale=7, temperature=0.5), "auto"),
        "negative_prompting": (NegativePrompting(7), "off"),
        "safe_latent_diffusion": (SafeLatentDiffusion(7), "off"),
    }
    for choice, (settings, economy) in expected.items():
        found = concept(settings={"settings": choice, **given})
        assert same(found.settings, settings), choice
        assert found.economy == economy


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_what_was_published(concept, name):
    assert same(concept(settings={"settings": "preset", "preset": name}).settings, PRESETS[name])


def test_what_was_published_multiplies_from_the_start(concept):
    """And a baseline has no evidence."""
    for choice in ("preset", "negative_prompting", "safe_latent_diffusion"):
        assert concept(settings={"settings": choice, "evidence_until": 0.5}).evidence_until == 0


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_of_the_schedule_lies_between_0_and_1(concept, share):
    with pytest.raises(ValueError, match="`evidence_until` must lie between 0 and 1"):
        concept(settings={"settings": "exact", "evidence_until": share})


@pytest.mark.parametrize("family", ["epsilon", "flow"])
def test_up_to_its_share_of_the_models_schedule_a_scale_multiplies_evidence_alone(bench, concept, family):
    model, odds = bench.model(family), 1 / 7
    given = {"settings": "exact", "guidance_scale": 5.0, "prior": 1 / 8}
    _, trace = bench.dng(model, concept(settings={**given, "evidence_until": 0.4}), scheduler="simple", steps=20)
    level = model.get_model_object("model_sampling").percent_to_sigma(0.4)
    sigma = level / (1 - level) if family == "flow" else level  # the trace has sigma / alpha of a flow
    p = trace.posterior[:, 0].double()
    known = (trace.sigmas > sigma)[:, None].expand_as(p) & (p < 1 / 8)
    early, late = trace.scale[:, 0].double()[known], trace.scale[:, 0].double()[~(trace.sigmas > sigma)]
    assert len(early) and len(late)
    torch.testing.assert_close(early, (p / (1 - p))[known], rtol=1e-4, atol=1e-6)
    plain = 5 * (p / (1 - p))[~(trace.sigmas > sigma)]
    torch.testing.assert_close(late, plain.clamp(max=10.0), rtol=1e-4, atol=1e-6)
    assert trace.scale[0, 0].tolist() == pytest.approx([odds] * 8, rel=1e-4)


@pytest.mark.parametrize("settings", ["CIFAR", ["4", 0], {"settings": "CIFAR"}])
def test_an_unknown_choice_is_refused_by_its_name(concept, settings):
    with pytest.raises(ValueError, match=r"`settings` must be one of exact, calibrated, .*; it is "):
        concept(settings=settings)


def test_an_unknown_preset_is_refused_by_its_name(concept):
    with pytest.raises(ValueError, match=r"preset must be one of authors' defaults, .*; it is 'CIFAR'"):
        concept(settings={"settings": "preset", "preset": "CIFAR"})


def test_where_the_choice_comes_through_a_link_its_inputs_still_count(concept):
    """ComfyUI, which does not know such a choice before it runs, hands its inputs over beside it."""
    found = concept(**{"settings": "custom", "settings.prior": 0.3, "settings.reference": "cfg"})
    assert (found.settings.prior, found.reference) == (0.3, "cfg")


def test_a_concept_of_its_own_has_no_say_in_how_a_run_evaluates(bench):
    offered = {name: {given.id for given in inputs} for name, inputs in bench.node_inputs.concept_choices().items()}
    of_a_run = bench.node_inputs.run_choices()
    assert not {"reference", "economy"} & set().union(*offered.values())
    assert {given.id for given in of_a_run["custom"]} == offered["custom"] | {"reference", "economy"}


def test_a_node_draws_with_exact_what_it_draws_with_its_values(bench):
    model, latent = bench.model(), bench.latent()
    common = (model, 1, 5, 1.0, "euler_ancestral", "karras", bench.cond(), bench.cond("0"), latent, 1.0)
    exact, custom, missing = (
        bench.sampling.KSamplerDNG.execute(*common, **settings).args[0]["samples"]
        for settings in (bench.inputs(settings="exact", prior=0.2), bench.inputs(**asdict(Settings())), {})
    )
    assert torch.equal(exact, custom) and torch.equal(exact, missing)


def test_every_node_that_guides_accepts_a_choice_that_comfyui_does_not_know(pack):
    """ComfyUI drops it otherwise, and the node would run with the default."""
    schemas = [node.define_schema() for node in importlib.import_module(f"{pack.__name__}.nodes").NODES]
    guiding = [schema for schema in schemas if any(given.id == "settings" for given in schema.inputs)]
    assert len(guiding) == 5
    assert all(schema.accept_all_inputs for schema in guiding)


# In a real server, whose validation, nesting and dropping of inputs are the point


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def drawn(server: Server, **inputs: Any) -> Any:
    """The table of a run on the oracle by a KSampler whose prompt is a stock KSampler's but for these inputs."""
    prompt = {
        "1": _node("DNGOracleModel", components=8, prediction="epsilon", kind="components"),
        "2": _node("DNGOracleCondition", components="all", of=8),
        "3": _node("DNGOracleCondition", components="0", of=8),
        "4": _node("DNGOracleLatent", batch_size=2),
        "5": _node(
            "KSamplerDNG", model=["1", 0], positive=["2", 0], negative=["3", 0], latent_image=["4", 0], seed=1,
            steps=4, cfg=1.0, sampler_name="euler_ancestral", scheduler="karras", denoise=1.0, **inputs,
        ),
        "6": _node("DNGTraceTable", trace=["5", 1]),
        "7": _node("PreviewAny", source=["6", 0]),
        "8": _node("PrimitiveString", value="custom"),
    }  # fmt: skip
    return run_workflow(server, prompt).ui["7"]["text"][0]


def test_a_stock_ksamplers_prompt_runs_with_the_class_name_alone_changed(comfyui_server):
    missing = drawn(comfyui_server)
    chosen = {"settings": "exact", "settings.guidance_scale": 1.0, "settings.prior": 0.2}
    assert "0.2" in missing and missing == drawn(comfyui_server, **chosen)
    assert missing == drawn(comfyui_server, settings="exact")


def test_values_of_a_choice_arrive_and_are_checked_by_comfyui(comfyui_server):
    higher = drawn(comfyui_server, **{"settings": "custom", "settings.prior": 0.7, "settings.temperature": 0.0})
    assert higher == drawn(comfyui_server, **{"settings": ["8", 0], "settings.prior": 0.7, "settings.temperature": 0})
    assert higher != drawn(comfyui_server)
    with pytest.raises(HeadlessError, match=r"bigger than max.*settings\.prior"):
        drawn(comfyui_server, **{"settings": "custom", "settings.prior": 7.0})


def test_an_unknown_choice_in_a_prompt_is_refused(comfyui_server):
    with pytest.raises(HeadlessError, match="`settings` must be one of"):
        drawn(comfyui_server, settings="CIFAR")


def test_calibrated_without_a_calibration_is_refused_before_anything_runs(comfyui_server):
    with pytest.raises(HeadlessError, match="Required input is missing"):
        drawn(comfyui_server, settings="calibrated")
