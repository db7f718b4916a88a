"""Every sampler of ComfyUI runs with guidance on the oracle, through KSampler (DNG) and through the patch."""

from typing import Any

import pytest
import torch

CFG_PP = "cfg_pp"


def names(bench: Any) -> list[str]:
    """All samplers that this ComfyUI has, but the one that is refused."""
    found = [name for name in bench.comfy.samplers.KSampler.SAMPLERS if name != "lcm"]
    assert len(found) >= 40
    return found


def test_every_sampler_runs_through_ksampler_dng(bench):
    model, bad = bench.model(), []
    for name in names(bench):
        options = {"cfg": 2.0, "unconditional": bench.cond()} if CFG_PP in name else {}
        samples, trace = bench.dng(model, latent=bench.latent(16), steps=12, sampler_name=name, **options)
        healthy = bool(samples.isfinite().all()) and bool(trace.posterior.isfinite().all())
        if not healthy or float(samples.abs().max()) > 10 or len(trace.sigmas) < 2:
            bad.append(name)
    assert bad == []


def test_every_sampler_runs_through_the_patch(bench):
    model = bench.model()
    patched, bad = bench.patch(model), []
    for name in names(bench):
        options = {"cfg": 2.0} if CFG_PP in name else {}
        samples = bench.sample(patched, bench.latent(16), steps=12, sampler_name=name, **options)
        if not bool(samples.isfinite().all()) or float(samples.abs().max()) > 10:
            bad.append(name)
    assert bad == []


def test_anchors_lie_on_the_schedule_whatever_the_sampler_does_in_between(bench):
    """Midpoints and trial points must not show in the trace."""
    model = bench.model()
    sigmas = {round(s, 4) for s in model_sigmas(bench, model, 6)}
    for name in ("heun", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "seeds_3", "sa_solver_pece", "uni_pc"):
        _, trace = bench.dng(model, steps=6, sampler_name=name)
        falling = trace.sigmas[1:] < trace.sigmas[:-1]
        assert bool(falling.all()), name
        if name not in bench.comfy.samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS:
            assert {round(s, 4) for s in trace.sigmas.tolist()} <= sigmas, name
            assert len(trace.sigmas) == 6, name


def model_sigmas(bench: Any, model: Any, steps: int) -> list[float]:
    sampling = model.get_model_object("model_sampling")
    return bench.comfy.samplers.calculate_sigmas(sampling, "karras", steps).tolist()


@pytest.mark.parametrize("entry", ["node", "patch"])
def test_lcm_is_refused_with_what_to_do_instead(bench, entry):
    model = bench.model()
    with pytest.raises(ValueError, match=r"lcm cannot be tracked.*choose another, such as euler_ancestral"):
        if entry == "node":
            bench.dng(model, sampler_name="lcm")
        else:
            bench.sample(bench.patch(model), sampler_name="lcm")


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_cfg_pp_without_an_unconditional_names_the_input(bench, scale):
    """With none, ComfyUI's CFG++ would take zeros for it: a wrong image and no error."""
    with pytest.raises(ValueError, match="unconditional"):
        bench.dng(bench.model(), bench.concept(guidance_scale=scale), sampler_name="euler_ancestral_cfg_pp")


@pytest.mark.parametrize("prediction", ["v_prediction", "flow"])
def test_other_model_types_are_guided_too(bench, prediction):
    model = bench.model(prediction)
    options = {"latent": bench.latent(400), "steps": 20, "scheduler": "simple"}
    samples, trace = bench.dng(model, **options)
    guided, unguided = bench.report(samples), bench.report(bench.sample(model, **options))
    assert guided.finite and bool(trace.posterior.isfinite().all())
    assert guided.forbidden_share < unguided.forbidden_share / 2
    assert torch.equal(bench.sample(bench.patch(model), **options), samples)


def test_a_flow_run_starts_at_infinite_noise_and_stays_finite(bench):
    _, trace = bench.dng(bench.model("flow"), scheduler="simple")
    assert trace.sigmas[0] == torch.inf
    assert bool(trace.sigmas[1:].isfinite().all()) and bool(trace.posterior.isfinite().all())
