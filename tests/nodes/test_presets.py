"""The preset of the nodes that guide: published settings in place of the inputs, and no other effect."""

import importlib
from dataclasses import asdict
from typing import Any

import pytest
import torch

from dng_core.settings import PRESETS


@pytest.fixture
def inputs(bench: Any, pack: Any) -> Any:
    return importlib.import_module(f"{pack.__name__}.nodes.inputs")


def test_custom_and_no_preset_at_all_take_the_inputs(bench, inputs):
    for preset in ({"preset": "custom"}, {}):
        (concept,) = inputs.concepts_from(bench.cond("0"), bench.inputs(prior=0.3, guidance_scale=7.0) | preset)
        assert (concept.settings.prior, concept.settings.guidance_scale) == (0.3, 7.0)


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"calibrated"}))  # test_calibrate.py has this one
def test_a_preset_takes_the_place_of_the_inputs_but_not_of_the_reference(bench, inputs, name):
    values = bench.inputs(reference="positive", prior=0.3) | {"preset": name}
    (concept,) = inputs.concepts_from(bench.cond("0"), values)
    assert asdict(concept.settings) == asdict(PRESETS[name])
    assert concept.reference == "positive"


def test_an_unknown_preset_is_refused_by_its_name(bench, inputs):
    with pytest.raises(ValueError, match=r"preset must be custom or one of exact, .*'CIFAR'"):
        inputs.concepts_from(bench.cond("0"), bench.inputs() | {"preset": "CIFAR"})


def test_the_node_draws_with_a_preset_what_it_draws_with_its_values(bench):
    model, latent = bench.model(), bench.latent()
    common = (model, 1, 5, 1.0, "euler_ancestral", "karras", bench.cond(), bench.cond("0"), latent, 1.0)
    chosen = asdict(PRESETS["exact"])
    by_name, by_value = (
        bench.sampling.KSamplerDNG.execute(*common, **bench.inputs(**changes) | preset).args[0]["samples"]
        for changes, preset in (({"prior": 0.5}, {"preset": "exact"}), (chosen, {}))
    )
    assert torch.equal(by_name, by_value)


def test_every_node_with_settings_has_the_preset_after_them(pack):
    """Graphs saved before there was a preset hold widget values by position; they must still load."""
    nodes = importlib.import_module(f"{pack.__name__}.nodes").NODES
    with_settings = 0
    for node in nodes:
        inputs = [i.id for i in node.define_schema().inputs]
        if "p_max" in inputs:
            with_settings += 1
            assert inputs.index("preset") > max(inputs.index(name) for name in ("method", "max_scale")), node
    assert with_settings >= 5
