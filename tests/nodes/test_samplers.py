"""Every sampler of ComfyUI runs with guidance on the oracle, through KSampler (DNG) and through the patch."""

from typing import Any

import pytest
import torch

SHARE = 1 / 8
"""Of the undesired component, without guidance."""
SAMPLES, STEPS = 400, 20
TRACKED_AS_DRAWN = (
    "euler_ancestral", "euler_ancestral_cfg_pp", "exp_heun_2_x0_sde", "dpm_2_ancestral", "dpmpp_2s_ancestral",
    "dpmpp_2s_ancestral_cfg_pp", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "ddpm",
    "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp", "seeds_2", "seeds_3",
)  # fmt: skip
"""Samplers that draw from the reverse kernel, or nearly: of the others a term of the posterior is missing."""


def names(bench: Any) -> list[str]:
    """All samplers that this ComfyUI has, but the one that is refused and those that differ in the device alone."""
    found = [name for name in bench.comfy.samplers.KSampler.SAMPLERS if name != "lcm" and not name.endswith("_gpu")]
    assert len(found) >= 38
    return found


@pytest.mark.parametrize(("rule", "tracked_leave"), [("algorithm_2", 0.09), ("step_noise", 0.06)])
def test_every_sampler_leaves_less_of_the_undesired_keeps_the_balance_and_the_distance(bench, rule, tracked_leave):
    """The matrix in reduced form. Whole: `dng figures matrix`."""
    model, bad = bench.model(), {}
    usual = bench.report(bench.sample(model, bench.latent(SAMPLES), steps=STEPS, sampler_name="euler"))
    for name in names(bench):
        options = {"latent": bench.latent(SAMPLES), "steps": STEPS, "unconditional": bench.cond()}
        samples, trace = bench.dng(model, bench.concept(rule=rule), sampler_name=name, **options)
        report = bench.report(samples)
        most = tracked_leave if name in TRACKED_AS_DRAWN else SHARE - 0.01
        ratio = report.median_distance / usual.median_distance if report.finite else 0.0
        if report.forbidden_share > most or report.kl_renormalised > 0.06 or not 0.5 < ratio < 2:
            bad[name] = (report.forbidden_share, report.kl_renormalised, ratio)
        assert len(trace.sigmas) >= 2, name
    assert bad == {}


def test_at_eight_steps_every_sampler_stays_finite_and_as_near_to_the_means_as_the_stock_one(bench):
    """Single samples may be pushed far by so few steps (see `max_scale` in the docs), but not the batch."""
    model, bad = bench.model(), {}
    options = {"steps": 8, "latent": bench.latent(100)}
    for name in names(bench):
        stock = bench.report(bench.sample(model, sampler_name=name, **options))
        samples, _ = bench.dng(model, sampler_name=name, unconditional=bench.cond(), **options)
        report, largest = bench.report(samples), float(samples.abs().max())
        if not report.finite or largest > 100 or not 0.7 < report.median_distance / stock.median_distance < 1.3:
            bad[name] = (largest, report.median_distance, stock.median_distance)
    assert bad == {}


def test_every_sampler_draws_the_same_through_the_patch_as_through_the_node(bench):
    model = bench.model()
    patched, different = bench.patch(model), []
    for name in names(bench):
        samples, _ = bench.dng(model, sampler_name=name, unconditional=bench.cond())
        if not torch.equal(bench.sample(patched, sampler_name=name), samples):
            different.append(name)
    assert different == []


def test_switched_off_every_sampler_is_the_stock_one_bit_for_bit(bench):
    model = bench.model()
    off, different = bench.concept(guidance_scale=0.0), []
    for name in names(bench):
        stock = bench.sample(model, sampler_name=name)
        node, _ = bench.dng(model, off, sampler_name=name, unconditional=bench.cond())
        patch = bench.sample(bench.patch(model, guidance_scale=0.0), sampler_name=name)
        if not torch.equal(stock, node) or not torch.equal(stock, patch):
            different.append(name)
    assert different == []


@pytest.mark.parametrize(
    "scheduler", ["simple", "sgm_uniform", "exponential", "ddim_uniform", "beta", "normal", "kl_optimal"]
)
def test_every_scheduler_is_followed(bench, scheduler):
    """All but karras, which the other tests use, and linear_quadratic, which is made for flow models."""
    samples, trace = bench.dng(bench.model(), latent=bench.latent(SAMPLES), steps=STEPS, scheduler=scheduler)
    report = bench.report(samples)
    assert report.finite and report.forbidden_share < 0.08 and report.kl_renormalised < 0.06
    assert len(trace.sigmas) >= STEPS - 1


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
    """Without this error, ComfyUI's CFG++ would use zeros as the unconditional and draw a wrong image."""
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
