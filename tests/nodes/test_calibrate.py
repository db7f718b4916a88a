"""Calibrate Model, Calibrate and Load Calibration on real runs: the oracle, where the answer is known, and MNIST."""

import importlib
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture
def nodes(pack: Any) -> Any:
    return importlib.import_module(f"{pack.__name__}.nodes.calibrate")


@pytest.fixture
def kept(pack: Any, tmp_path: Any, monkeypatch: Any) -> Any:
    """The module of kept calibrations, with a user folder of its own."""
    module = importlib.import_module(f"{pack.__name__}.nodes.calibrations")
    monkeypatch.setattr(module.folder_paths, "get_user_directory", lambda: str(tmp_path))
    return module


@pytest.fixture
def calibrate_model(bench: Any, nodes: Any) -> Any:
    def call(model: Any, concepts: Any, images: int = 64, steps: int = 30, shares: str = "alternatives", **more: Any):
        common = (model, 0, steps, "euler_ancestral", "karras", bench.cond(), concepts, shares, bench.latent(images))
        return SimpleNamespace(
            **dict(
                zip(
                    ("calibration", "text", "before", "after"),
                    nodes.CalibrateModel.execute(*common, **more).args,
                    strict=False,
                )
            )
        )

    return call


@pytest.fixture
def calibrate(bench: Any, nodes: Any) -> Any:
    def call(
        model: Any,
        positive: Any,
        negative: Any,
        latent: dict,
        steps: int = 20,
        cfg: float = 1.0,
        scheduler: str = "karras",
        **more: Any,
    ) -> SimpleNamespace:
        common = (model, 0, steps, cfg, "euler_ancestral", scheduler, positive, negative, latent)
        found = nodes.Calibrate.execute(*common, **more).args
        return SimpleNamespace(**dict(zip(("prior", "text", "before", "after"), found, strict=False)))

    return call


def alternatives(bench: Any, count: int = 8) -> tuple:
    return tuple(bench.concept(str(component), prior=1 / count) for component in range(count))


def test_on_the_oracle_the_exact_temperature_is_measured(bench, calibrate_model):
    found = calibrate_model(bench.model(), alternatives(bench))
    calibration = found.calibration.calibration
    assert 0.8 < calibration.temperature < 1.25
    assert calibration.least <= 1 <= calibration.most
    assert "do not tell the model from an exact one" in found.text
    assert found.before.posterior.shape == found.after.posterior.shape == (30, 8, 64)
    before, after = (trace.posterior[-8].sum(dim=0).mean() for trace in (found.before, found.after))
    assert abs(1 - after) < abs(1 - before)


def test_what_a_calibration_says_is_what_a_guided_run_tracks(bench, calibrate_model, calibrate):
    """With the push switched off, the course that Calibrate shows is the posterior of KSampler (DNG)."""
    model = bench.model()
    measured = calibrate_model(model, alternatives(bench)).calibration
    shown = calibrate(model, bench.cond(), bench.cond("0"), bench.latent(16), calibration=measured)
    concepts = bench.node_inputs.concepts_from(
        bench.cond("0"),
        bench.inputs(settings="calibrated", prior=shown.prior, calibration=measured),
    )
    assert concepts[0].settings.drift == measured.calibration.drift
    _, trace = bench.dng(model, list(concepts), bench.latent(16), steps=20, seed=0)
    torch.testing.assert_close(trace.posterior[:3, 0], shown.after.posterior[:3, 0], rtol=0.05, atol=0.02)
    assert trace.posterior.shape == (20, 1, 16)


def test_a_calibrated_run_can_look_less_often(bench, calibrate_model):
    measured = calibrate_model(bench.model(), alternatives(bench)).calibration
    inputs = bench.inputs(settings="calibrated", prior=1 / 8, calibration=measured, economy="auto")
    concepts = bench.node_inputs.concepts_from(bench.cond("0"), inputs)
    _, trace = bench.dng(bench.model(), list(concepts), bench.latent(1), steps=20, seed=0)
    assert trace.spared > 0


def test_the_share_is_measured_and_is_the_prior(bench, calibrate):
    found = calibrate(bench.model(), bench.cond(), bench.cond("0"), bench.latent(256), steps=100)
    assert 0.06 < found.prior < 0.2
    assert "of the images show it" in found.text


def test_it_says_beforehand_how_long_it_takes(bench, calibrate, caplog):
    with caplog.at_level("INFO"):
        calibrate(bench.model(), bench.cond(), bench.cond("0"), bench.latent(16))
    assert re.search(r"Measuring: about \d+ s left", caplog.text)


def test_a_duration_is_rounded_up(nodes):
    assert [nodes.lasting(seconds) for seconds in (0.2, 59.0, 61.0, 7200.0)] == ["1 s", "59 s", "2 min", "120 min"]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_concept_that_cannot_appear_is_not_seen(bench, calibrate, seed):
    found = calibrate(bench.model(), bench.cond("1,2,3"), bench.cond("0"), bench.latent(32), reference="positive")
    assert found.text.startswith("**Not seen** in 32 images")
    assert "0 of 32 images are pushed" in found.text
    assert found.prior == 0.001


def test_a_concept_that_every_image_shows_has_the_largest_prior(bench, nodes, calibrate, monkeypatch):
    """A share may be 1, a prior no more than p_max."""
    every = SimpleNamespace(prior=lambda least: 1.0)
    monkeypatch.setattr(nodes, "share_of", lambda *_: every)
    monkeypatch.setattr(nodes, "share_explained", lambda *_: "")
    found = calibrate(bench.model(), bench.cond(), bench.cond("0"), bench.latent(8), 8)
    assert found.prior == 0.99


def test_calibration_leaves_no_trace_on_the_model(bench, calibrate, calibrate_model):
    model = bench.model()
    before = bench.sample(model)
    calibrate(model, bench.cond(), bench.cond("0"), bench.latent(32))
    calibrate_model(model, alternatives(bench, 2), 8, 8)
    assert torch.equal(bench.sample(model), before)


def test_what_is_kept_is_loaded_and_nothing_is_overwritten(bench, calibrate_model, nodes, kept):
    found = calibrate_model(bench.model(), alternatives(bench, 2), 8, 8, save_as="my oracle")
    assert "kept as my oracle.json" in found.text
    again = calibrate_model(bench.model(), alternatives(bench, 2), 8, 8, save_as="my oracle")
    assert "kept as my oracle 2.json" in again.text
    assert {"my oracle", "my oracle 2"} <= set(kept.known())
    (loaded,) = nodes.LoadCalibration.execute("my oracle").args
    assert loaded == found.calibration


def test_a_calibration_of_another_model_or_size_is_refused(bench, calibrate_model, calibrate, kept):
    measured = calibrate_model(bench.model(), alternatives(bench, 2), 8, 8).calibration
    other = replace(measured, shape=(1, 8, 8))
    with pytest.raises(ValueError, match="latents of 1x8x8, and this one is 1x4x4: connect the calibration"):
        calibrate(bench.model(), bench.cond(), bench.cond("0"), bench.latent(8), calibration=other)
    for wrong, said in ((other, "1x8x8"), (measured, "of the model")):
        concept = bench.node_inputs.concepts_from(bench.cond("0"), bench.inputs(calibration=wrong))
        model = bench.model("epsilon" if wrong is other else "v_prediction")
        with pytest.raises(ValueError, match=said):
            bench.dng(model, list(concept))


def test_bad_input_is_refused_by_its_name(bench, calibrate, calibrate_model, nodes, kept):
    model, latent = bench.model(), bench.latent(8)
    with pytest.raises(ValueError, match="connect `unconditional`"):
        calibrate(model, bench.cond(), bench.cond("0"), latent, cfg=3.0)
    with pytest.raises(ValueError, match="`negative` is empty"):
        calibrate(model, bench.cond(), [], latent)
    with pytest.raises(ValueError, match="`steps` is 7; a calibration needs at least 8"):
        calibrate(model, bench.cond(), bench.cond("0"), latent, steps=7)
    with pytest.raises(ValueError, match="`latent_image` holds 7 images"):
        calibrate(model, bench.cond(), bench.cond("0"), bench.latent(7))
    with pytest.raises(ValueError, match="`concepts` holds one concept"):
        calibrate_model(model, alternatives(bench, 8)[:1])
    with pytest.raises(ValueError, match="`concepts` holds none"):
        calibrate_model(model, (), shares="priors")
    with pytest.raises(ValueError, match="`concepts` holds one whose `negative` is empty"):
        calibrate_model(model, (*alternatives(bench, 2), bench.concept([])))
    with pytest.raises(ValueError, match="`shares` must be alternatives or priors"):
        calibrate_model(model, alternatives(bench), shares="both")
    for name in ("../up", "a/b", ".hidden", "x" * 101, "end."):
        with pytest.raises(ValueError, match="`save_as` is"):
            calibrate_model(model, alternatives(bench, 2), 8, 8, save_as=name)
    with pytest.raises(ValueError, match="`name` is"):
        nodes.LoadCalibration.execute("../../etc/passwd")
    with pytest.raises(ValueError, match=r"there is no calibration .*gone\.json; or choose another in `name`"):
        nodes.LoadCalibration.execute("gone")
    with pytest.raises(ValueError, match="`cfg` must be at least 0 and at most 100; it is nan"):
        calibrate(model, bench.cond(), bench.cond("0"), latent, cfg=float("nan"), unconditional=bench.cond())
    with pytest.raises(ValueError, match="`settings` is calibrated, which needs a calibration"):
        bench.node_inputs.concepts_from(bench.cond("0"), bench.inputs(settings="calibrated"))


def test_a_name_is_refused_before_anything_is_measured(bench, calibrate_model, kept, count):
    """Also one of letters that take three bytes each, of which a file name holds no hundred."""
    model = bench.model()
    calls = count(model)
    for name in ("../up", "\u6728" * 100):
        with pytest.raises(ValueError, match="`save_as` is"):
            calibrate_model(model, alternatives(bench, 2), 8, 8, save_as=name)
    with pytest.raises(ValueError, match="`name` is"):
        kept.load("\u6728" * 100)
    assert not calls.forwards and not kept.folder().exists()


def test_a_sampler_that_needs_an_unconditional_is_refused_by_its_name(bench, nodes):
    """Calibrate Model has no input for one, so that an error must not ask to connect it."""
    run = bench.model(), 0, 8, "dpmpp_2m_cfg_pp", "karras", bench.cond()
    with pytest.raises(ValueError, match=r"`sampler_name` is dpmpp_2m_cfg_pp.*choose another"):
        nodes.CalibrateModel.execute(*run, alternatives(bench, 2), "priors", bench.latent(8))


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m", "uni_pc", "dpm_fast", "er_sde"])
def test_a_sampler_without_noise_measures_no_temperature(bench, nodes, sampler):
    run = bench.model(), 0, 8, sampler, "karras", bench.cond()
    with pytest.raises(ValueError, match=rf"`sampler_name` is {sampler}.*serves {sampler} too"):
        nodes.CalibrateModel.execute(*run, alternatives(bench, 2), "priors", bench.latent(8))


def test_where_nothing_can_be_written_the_file_is_named(bench, calibrate_model, kept):
    kept.folder().write_text("a file in the folder's place")
    with pytest.raises(ValueError, match=r"dng_calibrations/mine\.json .*`save_as`"):
        calibrate_model(bench.model(), alternatives(bench, 2), 8, 8, save_as="mine")
    assert kept.folder().read_text() == "a file in the folder's place"


def test_a_damaged_calibration_is_refused_by_its_name(nodes, kept):
    kept.folder().mkdir()
    (kept.folder() / "mine.json").write_text("{}")
    with pytest.raises(ValueError, match=r"mine\.json is no calibration.*choose another in `name`, which is 'mine'"):
        nodes.LoadCalibration.execute("mine")


@pytest.mark.parametrize(
    ("family", "empty"),
    [("video (Wan)", torch.zeros(8, 4, 1, 8, 8)), ("packed video and audio (LTXAV)", None)],
)
def test_a_calibration_is_of_the_state_that_comfyui_samples(bench, nodes, networks, family, empty):
    """ComfyUI gives an empty latent the model's channels, and packs several latents into one state."""
    model = networks.FAMILIES[family].build()
    latent = networks.FAMILIES[family].empty(8) if empty is None else {"samples": empty}
    concepts = [bench.concept(networks.prompt(seed)) for seed in (1, 2)]
    run = (model, 0, 8, "euler_ancestral", "karras", networks.prompt(0))
    measured = nodes.CalibrateModel.execute(*run, concepts, "priors", latent).args[0]
    run = (model, 0, 8, 1.0, *run[3:])
    prior = nodes.Calibrate.execute(*run, networks.prompt(1), latent, calibration=measured).args[0]
    settings = bench.inputs(settings="calibrated", prior=prior, calibration=measured)
    concept = bench.node_inputs.concepts_from(networks.prompt(1), settings)
    samples, _ = bench.dng(model, list(concept), latent, positive=networks.prompt(0))
    assert all(bool(part.isfinite().all()) for part in networks.parts(samples))


def test_on_mnist_a_calibrated_concept_is_seen(bench, calibrate, pack, nodes):
    pixels = importlib.import_module(f"{pack.__name__}.nodes.pixel_models")
    (model,) = pixels.LoadPixelModel.execute("mnist").args
    digits, zero = (pixels.ClassLabel.execute(model, label).args[0] for label in ("none", "0"))
    (latent,) = pixels.EmptyPixelLatent.execute(model, 24).args
    (measured,) = nodes.LoadCalibration.execute("shipped: mnist").args
    found = calibrate(model, digits, zero, latent, 50, scheduler="normal", calibration=measured)
    assert 0.02 <= found.prior <= 0.4
    assert "of the images show it" in found.text
