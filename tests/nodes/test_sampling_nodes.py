"""KSampler (DNG), its advanced form and DNG Guider on the oracle: what they remove, evaluate, accept and refuse."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from dng_core.evidence import Call, held_evidence

SAMPLERS = ["euler", "euler_ancestral", "dpmpp_2m_sde", "heun", "ddpm"]


def custom(
    bench: Any, guider: Any, latent: dict, steps: int = 5, seed: int = 1, sampler: str = "euler_ancestral"
) -> Tensor:
    """SamplerCustomAdvanced over Karras sigmas."""
    nodes = importlib.import_module("comfy_extras.nodes_custom_sampler")
    sigmas = nodes.BasicScheduler.execute(guider.model_patcher, "karras", steps, 1.0).args[0]
    noise = nodes.RandomNoise.execute(seed).args[0]
    sampler_object = nodes.KSamplerSelect.execute(sampler).args[0]
    return nodes.SamplerCustomAdvanced.execute(noise, guider, sampler_object, sigmas, latent).args[0]["samples"]


def dng_guider(bench: Any, model: Any, cfg: float = 1.0, unconditional: list | None = None, **changes: Any) -> Any:
    return bench.sampling.DNGGuider.execute(
        model, bench.cond(), bench.cond("0"), cfg, unconditional, **bench.inputs(**changes)
    ).args[0]


# What it removes


@pytest.mark.parametrize(("steps", "at_most"), [(30, 0.05), (100, 0.03)])
def test_the_exact_setting_removes_a_component_and_leaves_the_others_balanced(bench, steps, at_most):
    """Figure 4: euler_ancestral, Karras, 2,000 samples, through the node and through the patch, which agree."""
    model, latent = bench.model(), bench.latent(2000)
    samples, _ = bench.dng(model, latent=latent, steps=steps)
    guided = bench.report(samples)
    assert guided.finite
    assert guided.forbidden_share <= at_most
    assert guided.kl_renormalised <= 0.02
    assert torch.equal(bench.sample(bench.patch(model), latent, steps=steps), samples)


def test_without_guidance_the_component_is_drawn_as_often_as_the_others(bench):
    unguided = bench.report(bench.sample(bench.model(), bench.latent(2000), steps=30))
    assert 0.10 < unguided.forbidden_share < 0.17


def test_the_node_itself_samples_what_its_function_samples(bench):
    model, latent = bench.model(), bench.latent()
    out, trace = bench.sampling.KSamplerDNG.execute(
        model, 1, 5, 1.0, "euler_ancestral", "karras", bench.cond(), bench.cond("0"), latent, 1.0, **bench.inputs()
    ).args
    samples, expected = bench.dng(model, latent=latent)
    assert torch.equal(out["samples"], samples)
    assert torch.equal(trace.posterior, expected.posterior)


def test_the_best_reference_under_cfg_is_the_unconditional(bench):
    """The negative 0, 4, 5 is only partly in the positive 0-3, so it must be compared with the unconditional."""
    model = bench.model()
    options = {"latent": bench.latent(600), "steps": 30, "cfg": 3.0, "positive": bench.cond("0,1,2,3")}
    left = {}
    for reference, negative, prior in (("auto", "0,4,5", 3 / 8), ("positive", "0,4,5", 1 / 4), ("joint", "0", 1 / 4)):
        concept = bench.concept(negative, "positive" if reference == "joint" else reference, prior=prior)
        samples, _ = bench.dng(model, concept, unconditional=bench.cond(), **options)
        left[reference] = bench.report(samples).forbidden_share
    assert left["auto"] < 0.12 and left["joint"] < 0.12
    assert left["positive"] > 1.5 * left["auto"]


def test_the_references_are_the_predictions_that_they_name(bench, monkeypatch):
    seen = record_guidance(bench, monkeypatch)
    model, latent = bench.model(), bench.latent(4)
    parts = {"auto": None, "positive": [0, 1, 2, 3]}
    for reference in ("auto", "positive", "cfg"):
        seen.clear()
        bench.dng(
            model,
            bench.concept("5", reference),
            latent,
            cfg=3.0,
            positive=bench.cond("0,1,2,3"),
            unconditional=bench.cond(),
        )
        for state, level, base, compared, negatives, _ in seen:
            positive, whole = (bench.mixture.denoised(state, level, p) for p in ([0, 1, 2, 3], None))
            mix = whole + 3 * (positive - whole)
            wanted = mix if reference == "cfg" else bench.mixture.denoised(state, level, parts[reference])
            torch.testing.assert_close(base, mix, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(compared, wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(negatives[0], bench.mixture.denoised(state, level, [5]), rtol=1e-4, atol=1e-4)


def record_guidance(bench: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Every call of the guidance: state, level, base, reference, negatives."""
    seen: list[tuple] = []
    call = bench.guidance.NegativeGuidance.__call__

    def recorded(self: Any, *args: Any) -> Tensor:
        seen.append(tuple(a.clone() if isinstance(a, Tensor) else a for a in args))
        return call(self, *args)

    monkeypatch.setattr(bench.guidance.NegativeGuidance, "__call__", recorded)
    return seen


# What it evaluates


@pytest.mark.parametrize(("cfg", "predictions"), [(1.0, 2), (3.0, 3)])
def test_all_predictions_of_a_step_are_one_call_and_one_forward_pass(bench, count, cfg, predictions):
    model = bench.model()
    calls = count(model)
    bench.dng(model, latent=bench.latent(8), cfg=cfg, unconditional=bench.cond() if cfg != 1 else None)
    assert calls.batches == [predictions] * 5
    assert calls.forwards == [8 * predictions] * 5


def test_at_cfg_1_a_connected_unconditional_is_not_evaluated(bench, count):
    model = bench.model()
    calls = count(model)
    bench.dng(model, unconditional=bench.cond())
    assert calls.batches == [2] * 5


@pytest.mark.parametrize("off", ["scale 0", "no negative"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_off_means_bit_identical_to_the_stock_ksampler_and_nothing_more_evaluated(bench, count, off, sampler, cfg):
    model = bench.model()
    concept = bench.concept([]) if off == "no negative" else bench.concept("0", guidance_scale=0.0)
    options = {"cfg": cfg, "sampler_name": sampler, "positive": bench.cond("0,1,2")}
    calls = count(model)
    stock = bench.sample(model, negative=bench.cond("5,6"), **options)
    expected = (list(calls.batches), list(calls.forwards))
    calls.batches.clear()
    calls.forwards.clear()
    samples, trace = bench.dng(model, concept, unconditional=bench.cond("5,6"), **options)
    assert torch.equal(samples, stock)
    assert (calls.batches, calls.forwards) == expected
    assert trace is None


def test_off_without_an_unconditional_is_the_stock_ksampler_at_cfg_1(bench):
    model = bench.model()
    samples, _ = bench.dng(model, bench.concept("0", guidance_scale=0.0))
    assert torch.equal(samples, bench.sample(model))


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_guider_samples_what_ksampler_dng_samples(bench, scale):
    model, latent = bench.model(), bench.latent()
    guider = dng_guider(bench, model, guidance_scale=scale)
    samples, trace = bench.dng(model, bench.concept("0", guidance_scale=scale), latent)
    assert torch.equal(custom(bench, guider, latent), samples)
    assert (guider.trace is None) if trace is None else torch.equal(guider.trace.posterior, trace.posterior)


def test_a_guider_can_be_used_twice(bench):
    guider, latent = dng_guider(bench, bench.model()), bench.latent()
    assert torch.equal(custom(bench, guider, latent), custom(bench, guider, latent))


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpm_2_ancestral"])
def test_sigmas_of_ones_own_are_followed_and_at_scale_0_the_stock_guiders(bench, sampler):
    """The sigmas are uneven and start below the model's largest. Less than half of the undesired is left."""
    model, latent = bench.model(), bench.latent(400)["samples"]
    sigmas = torch.tensor([120.0, 40, 20, 12, 9, 6, 5, 4, 3, 2.6, 2, 1.7, 1.3, 1, 0.8, 0.7, 0.5, 0.3, 0.1, 0.02, 0])
    noise = bench.comfy.sample.prepare_noise(latent, 1, None)
    stock = bench.comfy.samplers.CFGGuider(model)
    stock.set_conds(bench.cond(), bench.cond())
    stock.set_cfg(1.0)
    guiders = stock, dng_guider(bench, model, guidance_scale=0.0), dng_guider(bench, model)
    unguided, off, guided = (
        guider.sample(noise, latent, bench.comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=1)
        for guider in guiders
    )
    assert torch.equal(off, unguided)
    assert bench.report(guided).forbidden_share < bench.report(unguided).forbidden_share / 2
    torch.testing.assert_close(guiders[2].trace.sigmas, sigmas[:-1])


def test_a_guider_given_a_single_sigma_takes_no_step(bench):
    """What SplitSigmas at step 0 hands on."""
    guider = dng_guider(bench, bench.model())
    latent = torch.zeros(2, 1, 4, 4)
    euler = bench.comfy.samplers.sampler_object("euler")
    out = guider.sample(latent, latent, euler, torch.tensor([3.0]), disable_pbar=True, seed=0)
    assert out.shape == latent.shape
    assert guider.trace.sigmas.shape == (0,)


# The trace


def test_the_trace_is_per_step_concept_and_image(bench):
    _, trace = bench.dng(bench.model(), bench.concept("0", p_min=0.01, p_max=0.9), bench.latent(6), steps=7)
    assert trace.sigmas.shape == (7,)
    assert trace.posterior.shape == trace.scale.shape == (7, 1, 6)
    assert bool((trace.sigmas[1:] < trace.sigmas[:-1]).all())
    torch.testing.assert_close(trace.posterior[0], torch.full((1, 6), 1 / 8))
    assert float(trace.posterior.min()) > 0.01 - 1e-6 and float(trace.posterior.max()) < 0.9 + 1e-6
    torch.testing.assert_close(trace.scale, trace.posterior / (1 - trace.posterior))


def test_the_trace_is_near_the_exact_posterior_of_the_visited_states(bench, monkeypatch):
    seen = record_guidance(bench, monkeypatch)
    _, trace = bench.dng(bench.model(), latent=bench.latent(300), steps=60)
    exact = [bench.mixture.log_posterior(state, level, [0]).exp() for state, level, *_ in seen]
    assert float((trace.posterior[:, 0] - torch.stack(exact)).abs().mean()) < 0.03


# Latents


def test_outside_an_inpainting_mask_nothing_counts_for_the_posterior(bench, monkeypatch):
    seen = record_guidance(bench, monkeypatch)
    content = bench.mixture.means[:1].expand(6, -1, -1, -1).clone()
    latent = {"samples": content, "noise_mask": bench.left_half()}
    _, trace = bench.dng(
        bench.model(), bench.concept("0", p_min=1e-12, rule="algorithm_2"), latent, sampler_name="euler"
    )
    inside = [[x[..., :2] for x in (s, n[0], r)] for s, _, _, r, n, _ in seen]
    log_p = torch.full((6,), 1 / 8).log()
    for (start, negative, reference), (end, _, _), high, low in zip(
        inside, inside[1:], trace.sigmas, trace.sigmas[1:], strict=False
    ):
        said = Call(start, float(high), reference, negative)
        log_p = log_p + held_evidence(said, Call(end, float(low)), said)
        log_p = log_p.clamp(torch.tensor(1e-12).log(), torch.tensor(0.99).log())
    torch.testing.assert_close(trace.posterior[-1, 0], log_p.exp(), rtol=1e-2, atol=1e-6)


def test_an_inpainting_mask_keeps_what_is_outside(bench):
    content = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    samples, _ = bench.dng(bench.model(), latent={"samples": content, "noise_mask": bench.left_half()})
    torch.testing.assert_close(samples[..., 2:], content[..., 2:])
    assert not torch.allclose(samples[..., :2], content[..., :2], atol=1e-2)


def test_denoise_below_1_starts_at_the_prior_further_down(bench):
    model = bench.model()
    _, whole = bench.dng(model, steps=10)
    samples, part = bench.dng(model, steps=10, denoise=0.5)
    assert len(part.sigmas) == 10
    assert part.sigmas[0] < whole.sigmas[0] / 2
    torch.testing.assert_close(part.posterior[0], torch.full((1, 8), 1 / 8))
    assert bool(samples.isfinite().all())


def test_denoise_0_gives_the_latent_back(bench):
    latent = {"samples": torch.ones(2, 1, 4, 4)}
    samples, trace = bench.dng(bench.model(), latent=latent, denoise=0.0)
    assert torch.equal(samples, bench.sample(bench.model(), latent, denoise=0.0))
    assert trace is None


RANGES = [
    (0, 3, "enable"),
    (0, 3, "disable"),
    (2, 10000, "disable"),
    (5, 10000, "disable"),
    (4, 2, "disable"),
    (0, 0, "disable"),
]


@pytest.mark.parametrize(("start", "end", "leftover"), RANGES)
def test_the_advanced_node_takes_the_steps_that_the_stock_one_takes(bench, start, end, leftover):
    """With a push too small to be seen, the guided path gives what KSampler (Advanced) gives."""
    model, latent = bench.model(), {"samples": torch.ones(4, 1, 4, 4)}
    common = (model, "enable", 1, 5, 1.0, "euler_ancestral", "karras", bench.cond())
    tiny = bench.inputs(guidance_scale=1e-30)
    out, trace = bench.sampling.KSamplerAdvancedDNG.execute(
        *common, bench.cond("0"), latent, start, end, leftover, **tiny
    ).args
    (stock,) = bench.stock.KSamplerAdvanced().sample(*common, bench.cond(), latent, start, end, leftover)
    torch.testing.assert_close(out["samples"], stock["samples"])
    steps = max(min(end, 5) - start, 0)
    assert (0 if trace is None else len(trace.sigmas)) == steps


def test_without_added_noise_the_run_starts_from_the_latent(bench, monkeypatch):
    seen = record_guidance(bench, monkeypatch)
    latent = {"samples": torch.full((2, 1, 4, 4), 3.0)}
    bench.dng(bench.model(), latent=latent, disable_noise=True)
    torch.testing.assert_close(seen[0][0], latent["samples"])


def test_without_added_noise_guidance_goes_on_from_a_latent_that_is_noisy_already(bench):
    """Noise added outside and none by KSampler Advanced (DNG): samples and posterior are those of KSampler (DNG)."""
    model = bench.model()
    sigmas = bench.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 20)
    plain, trace = bench.dng(model, latent=bench.latent(300), steps=20, sampler_name="dpmpp_2m")
    noise = bench.comfy.sample.prepare_noise(bench.latent(300)["samples"], 1, None)
    noisy = {"samples": noise * (1 + sigmas[0] ** 2) ** 0.5}
    common = (model, "disable", 1, 20, 1.0, "dpmpp_2m", "karras", bench.cond())
    out, again = bench.sampling.KSamplerAdvancedDNG.execute(
        *common, bench.cond("0"), noisy, 0, 10000, "disable", **bench.inputs()
    ).args
    torch.testing.assert_close(out["samples"], plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again.posterior, trace.posterior, rtol=1e-2, atol=1e-3)
    (unguided,) = bench.stock.KSamplerAdvanced().sample(*common, bench.cond(), noisy, 0, 10000, "disable")
    off, _ = bench.sampling.KSamplerAdvancedDNG.execute(
        *common, bench.cond("0"), noisy, 0, 10000, "disable", **bench.inputs(guidance_scale=0.0)
    ).args
    assert torch.equal(off["samples"], unguided["samples"])


def test_batch_index_chooses_the_noise(bench):
    model = bench.model()
    whole, _ = bench.dng(model, latent=bench.latent(4), sampler_name="euler")
    part, _ = bench.dng(model, latent=bench.latent(2, batch_index=[3, 1]), sampler_name="euler")
    torch.testing.assert_close(part, whole[[3, 1]], rtol=1e-4, atol=1e-4)


def test_the_latents_other_entries_pass_through(bench):
    out, _ = bench.sampling.KSamplerDNG.execute(
        bench.model(), 1, 2, 1.0, "euler", "karras", bench.cond(), bench.cond("0"),
        bench.latent(2, batch_index=[0, 1], mine="kept"), 1.0, **bench.inputs(),
    ).args  # fmt: skip
    assert out["mine"] == "kept" and out["batch_index"] == [0, 1]
