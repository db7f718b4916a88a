"""Calibrate on real runs: the oracle, where the answer is known, and the shipped MNIST model."""

import importlib
from typing import Any

import pytest
import torch


@pytest.fixture
def calibrate(bench: Any, pack: Any) -> Any:
    node = importlib.import_module(f"{pack.__name__}.nodes.calibrate").Calibrate

    def call(
        model: Any,
        positive: Any,
        negative: Any,
        latent: dict,
        steps: int = 30,
        cfg: float = 1.0,
        scheduler: str = "karras",
        **more: Any,
    ):
        common = (model, 0, steps, cfg, "euler_ancestral", scheduler, positive, negative, latent)
        return node.execute(*common, **more).args

    return call


def test_on_the_oracle_the_exact_settings_are_proposed(bench, calibrate):
    prior, temperature, offset, text = calibrate(bench.model(), bench.cond(), bench.cond("0"), bench.latent(256))
    assert 0.08 < prior < 0.2
    assert (temperature, offset) == (1.0, 0.0)
    assert "Both goals are met" in text


def test_under_cfg_the_positive_may_ask_for_what_is_to_be_avoided(bench, calibrate):
    """Every image shows the undesired concept, and yet the prior is the concept's share without the positive."""
    prior, temperature, _, text = calibrate(
        bench.model(), bench.cond("0"), bench.cond("0"), bench.latent(64), cfg=1.5, unconditional=bench.cond()
    )
    assert int(text.split("- ")[1].split(" of 64 images")[0]) > 32
    assert 0.02 < prior < 0.25
    assert temperature > 0.5


def test_the_unrelated_concept_is_looked_at_and_evaluated_in_the_same_batch(bench, calibrate, count):
    model = bench.model()
    calls = count(model)
    *_, text = calibrate(model, bench.cond("0,1"), bench.cond("0"), bench.latent(64), unrelated=bench.cond("5"))
    assert set(calls.batches) == {3}
    assert "unrelated images" in text


def test_calibration_leaves_no_trace_on_the_model(bench, calibrate):
    model = bench.model()
    before = bench.sample(model)
    calibrate(model, bench.cond(), bench.cond("0"), bench.latent(32))
    assert torch.equal(bench.sample(model), before)


def test_bad_input_is_refused_by_its_name(bench, calibrate):
    model, latent = bench.model(), bench.latent(8)
    with pytest.raises(ValueError, match="connect `unconditional`"):
        calibrate(model, bench.cond(), bench.cond("0"), latent, cfg=3.0)
    with pytest.raises(ValueError, match="`negative` is empty"):
        calibrate(model, bench.cond(), [], latent)
    with pytest.raises(ValueError, match="at least 3 steps"):
        calibrate(model, bench.cond(), bench.cond("0"), latent, steps=2)
    with pytest.raises(ValueError, match="on_by"):
        calibrate(model, bench.cond(), bench.cond("0"), latent, on_by=0.0)


def test_on_mnist_it_proposes_usable_settings(bench, calibrate, pack):
    pixels = importlib.import_module(f"{pack.__name__}.nodes.pixel_models")
    (model,) = pixels.LoadPixelModel.execute("mnist").args
    digits, zero = (pixels.ClassLabel.execute(model, label).args[0] for label in ("none", "0"))
    (latent,) = pixels.EmptyPixelLatent.execute(model, 24).args
    prior, temperature, offset, text = calibrate(model, digits, zero, latent, steps=20, scheduler="normal")
    assert "of 24 images" in text
    assert 0.05 <= prior <= 0.5
    assert temperature >= 0.5
    assert offset <= 3
