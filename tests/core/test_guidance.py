"""How predictions are combined: DNG, negative prompting, Safe Latent Diffusion and CFG, by their formulas."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dng_core.guidance import (
    NegativeGuidance,
    classifier_free_guidance,
    combine,
    dynamic_scales,
    safe_latent_direction,
)
from dng_core.kernels import NoiseFrame
from dng_core.settings import Settings

WIDE = Settings(prior=0.3, p_min=1e-30, p_max=1 - 1e-9, max_scale=math.inf)


def tensors(count: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def log(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


def test_dynamic_scale_is_lambda_0_p_over_1_minus_p():
    p = [0.001, 0.2, 0.5, 0.9, 0.999]
    (scale,) = dynamic_scales([log(*p)], [WIDE.with_(guidance_scale=3.0)])
    assert scale.tolist() == pytest.approx([3 * q / (1 - q) for q in p], rel=1e-9)


def test_the_cap_applies_to_the_product():
    (scale,) = dynamic_scales([log(0.2, 0.9)], [WIDE.with_(guidance_scale=4.0, max_scale=5.0)])
    assert scale.tolist() == pytest.approx([1.0, 5.0])


def test_several_concepts_share_what_is_absent_of_all():
    scales = dynamic_scales([log(0.1, 0.3), log(0.2, 0.5)], [WIDE, WIDE.with_(guidance_scale=2.0)])
    assert scales[0].tolist() == pytest.approx([0.1 / 0.7, 0.3 / 0.2])
    assert scales[1].tolist() == pytest.approx([2 * 0.2 / 0.7, 2 * 0.5 / 0.2])


def test_posteriors_that_sum_above_p_max_are_rescaled_together():
    settings = WIDE.with_(p_max=0.9)
    scales = dynamic_scales([log(0.8), log(0.4)], [settings, settings])
    assert [float(s) for s in scales] == pytest.approx([0.6 / 0.1, 0.3 / 0.1])


def test_exact_scales_of_two_exclusive_concepts_leave_the_mixture_of_the_rest():
    """p(x | neither) has the denoiser D - sum lambda_i (D_i - D), whatever the three parts."""
    shares = [0.2, 0.3, 0.5]
    parts = tensors(3, 1, 4)
    whole = sum((s * d for s, d in zip(shares, parts, strict=True)), torch.zeros(1, 4, dtype=torch.float64))
    scales = dynamic_scales([log(0.2), log(0.3)], [WIDE, WIDE])
    torch.testing.assert_close(combine(whole, [parts[0] - whole, parts[1] - whole], scales), parts[2])


def test_classifier_free_guidance():
    positive, unconditional = tensors(2, 3, 4)
    assert torch.equal(classifier_free_guidance(positive, unconditional, 0), unconditional)
    torch.testing.assert_close(classifier_free_guidance(positive, unconditional, 1), positive)
    torch.testing.assert_close(
        classifier_free_guidance(positive, unconditional, 7.5), 7.5 * positive - 6.5 * unconditional
    )


def test_combine_pushes_each_image_by_its_own_scale():
    base, first, second = tensors(3, 2, 3, 4, 5)
    out = combine(base, [first, second], [torch.tensor([0.0, 2.0]), torch.tensor([3.0, 0.0])])
    torch.testing.assert_close(out, torch.stack([base[0] - 3 * second[0], base[1] - 2 * first[1]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_at_scale_0_combine_returns_the_bases_values_in_its_dtype(dtype):
    base, direction = tensors(2, 3, 50, dtype=torch.float32).to(dtype)
    out = combine(base, [direction], [torch.zeros(3)])
    assert out.dtype == dtype
    assert torch.equal(out, base)


def guide(
    settings: Sequence[Settings], levels: Sequence[float], points: Sequence[Tensor], frame: NoiseFrame | None = None
) -> tuple[list[Tensor], NegativeGuidance]:
    """Run over points (state, base, reference, one prediction per concept): the outputs, and the guidance."""
    guidance = NegativeGuidance(settings, frame=frame or NoiseFrame("ve"), levels=levels)
    outs = [
        guidance(point[0], level, point[1], point[2], list(point[3:]))
        for point, level in zip(points, levels, strict=True)
    ]
    return outs, guidance


def test_dng_pushes_the_base_by_the_tracked_scale_along_negative_minus_reference():
    points = [tensors(4, 5, 2, 4, seed=s) * 0.3 for s in range(3)]
    outs, guidance = guide([WIDE.with_(guidance_scale=2.0)], [4.0, 2.0, 1.0], points)
    posterior = guidance.trackers[0].anchors
    assert not torch.allclose(posterior[1].log_posterior, posterior[0].log_posterior)
    for point, out, anchor in zip(points, outs, posterior, strict=True):
        p = anchor.log_posterior.exp()[:, None, None]
        torch.testing.assert_close(out, point[1] - 2 * p / (1 - p) * (point[3] - point[2]))


def test_negative_prompting_pushes_by_a_constant_whatever_the_posterior():
    points = [tensors(4, 5, 2, 4, seed=s) for s in range(3)]
    outs, guidance = guide([WIDE.with_(method="negative_prompting", guidance_scale=1.5)], [4.0, 2.0, 1.0], points)
    for point, out in zip(points, outs, strict=True):
        torch.testing.assert_close(out, point[1] - 1.5 * (point[3] - point[2]))
    assert guidance.trace().scale.unique().tolist() == [1.5]


@pytest.mark.parametrize("threshold", [0.04, math.inf])
def test_safe_latent_diffusion_is_its_formula_in_noise_predictions(threshold):
    """eps_hat = eps - lambda g over three steps, literally, and brought back to a denoised prediction."""
    settings = WIDE.with_(method="safe_latent_diffusion", guidance_scale=7.0, sld_threshold=threshold)
    levels = [4.0, 2.0, 0.5]
    points = [tensors(4, 5, 2, 4, seed=s) * 0.1 for s in range(3)]
    outs, _ = guide([settings], levels, points)
    momentum = torch.zeros(5, 2, 4, dtype=torch.float64)
    for point, out, sigma in zip(points, outs, levels, strict=True):
        x, base, reference, negative = point
        eps, eps_negative, eps_base = ((x - d) / sigma for d in (reference, negative, base))
        d = eps - eps_negative
        mask = torch.where(d < threshold, torch.minimum(torch.ones_like(d), 100 * d.abs()), 0.0)
        g = -mask * d + 0.2 * momentum
        momentum = 0.1 * momentum + 0.9 * g
        torch.testing.assert_close(out, x - sigma * (eps_base - 7 * g), rtol=1e-9, atol=1e-12)
        assert bool((mask == 0).any() if threshold < 1 else mask.all())


def test_safe_latent_direction_at_infinite_noise_is_zero_and_keeps_its_momentum():
    difference, momentum = tensors(2, 2, 3)
    direction, kept = safe_latent_direction(difference, math.inf, momentum, Settings())
    assert not direction.any()
    assert torch.equal(kept, momentum)


def test_concepts_of_different_methods_add_up():
    dng, prompting = WIDE.with_(prior=0.25), WIDE.with_(method="negative_prompting", guidance_scale=0.5)
    (out,), _ = guide([dng, prompting], [4.0], [point := tensors(5, 3, 2, 2)])
    scale = 0.25 / (1 - 0.25 - 0.3)
    torch.testing.assert_close(out, point[1] - scale * (point[3] - point[2]) - 0.5 * (point[4] - point[2]))


@pytest.mark.parametrize("method", ["dng", "negative_prompting", "safe_latent_diffusion"])
def test_a_negative_equal_to_the_reference_changes_nothing(method):
    x, base, reference = tensors(3, 2, 3, 4, dtype=torch.float32)
    settings = Settings(method=method)
    outs, guidance = guide([settings], [4.0, 2.0], [torch.stack([x, base, reference, reference])] * 2)
    assert all(torch.equal(out, base) for out in outs)
    torch.testing.assert_close(guidance.trace().posterior, torch.full((2, 1, 2), 0.2))


@pytest.mark.parametrize("shape", [(2, 6), (2, 2, 3), (2, 1, 2, 3), (2, 1, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("method", ["dng", "negative_prompting", "safe_latent_diffusion"])
def test_any_latent_rank_gives_the_same_result(shape, method):
    points = [tensors(4, 2, 6, seed=s) for s in range(2)]
    flat, _ = guide([Settings(method=method)], [4.0, 2.0], points)
    shaped, _ = guide([Settings(method=method)], [4.0, 2.0], [p.reshape(4, *shape) for p in points])
    for a, b in zip(flat, shaped, strict=True):
        torch.testing.assert_close(b.reshape(2, 6), a)


@pytest.mark.parametrize("method", ["dng", "negative_prompting", "safe_latent_diffusion"])
def test_a_batch_of_three_is_three_batches_of_one(method):
    points = [tensors(4, 3, 2, 4, seed=s) * 0.3 for s in range(4)]
    levels = [4.0, 2.0, 1.0, 0.5]
    together, _ = guide([Settings(method=method)], levels, points)
    for i in range(3):
        alone, _ = guide([Settings(method=method)], levels, [p[:, i : i + 1] for p in points])
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(part, whole[i : i + 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_is_tracked_in_float32_and_half_precision_out(dtype):
    points = [tensors(4, 2, 1, 64, 64, seed=s, dtype=torch.float32).mul(0.1).to(dtype) for s in range(3)]
    halves, half = guide([Settings()], [4.0, 2.0, 1.0], points)
    wholes, whole = guide([Settings()], [4.0, 2.0, 1.0], [p.float() for p in points])
    assert {out.dtype for out in halves} == {dtype}
    assert {a.log_posterior.dtype for a in half.trackers[0].anchors} == {torch.float32}
    torch.testing.assert_close(half.trace().posterior, whole.trace().posterior, rtol=1e-5, atol=1e-7)
    for a, b in zip(halves, wholes, strict=True):
        assert torch.equal(a, b.to(dtype))


def test_the_callers_tensors_may_be_overwritten_after_a_call():
    """Samplers reuse their buffers: the tracker must not see what is written into them later."""
    points = [tensors(4, 2, 3, 4, seed=s, dtype=torch.float32) for s in range(2)]
    expected, _ = guide([Settings()], [4.0, 2.0], points)
    guidance = NegativeGuidance([Settings()], levels=[4.0, 2.0])
    for point, level, wanted in zip(points, [4.0, 2.0], expected, strict=True):
        state, base, reference, negative = (x.clone() for x in point)
        torch.testing.assert_close(guidance(state, level, base, reference, [negative]), wanted)
        for buffer in (state, base, reference, negative):
            buffer.fill_(math.nan)


def test_the_trace_holds_each_step_concept_and_image():
    points = [tensors(5, 7, 2, 4, seed=s, dtype=torch.float32) * 0.2 for s in range(3)]
    settings = [Settings(prior=0.2, p_min=0.01, p_max=0.9), Settings(prior=0.1, p_min=0.01, p_max=0.9)]
    _, guidance = guide(settings, [4.0, 2.0, 1.0], points)
    trace = guidance.trace()
    assert trace.sigmas.tolist() == [4.0, 2.0, 1.0]
    assert trace.posterior.shape == trace.scale.shape == (3, 2, 7)
    assert trace.posterior.dtype == trace.scale.dtype == torch.float32
    torch.testing.assert_close(trace.posterior[0], torch.tensor([[0.2] * 7, [0.1] * 7]))
    assert float(trace.posterior.min()) >= 0.01 - 1e-6 and float(trace.posterior.max()) <= 0.9 + 1e-6


def test_a_flow_trace_is_in_noise_levels_of_the_ve_frame():
    points = [tensors(4, 2, 3, seed=s) for s in range(2)]
    outs, guidance = guide([Settings()], [1.0, 0.5], points, NoiseFrame("flow", 2.0))
    assert guidance.trace().sigmas.tolist() == [math.inf, 2.0]
    assert all(bool(out.isfinite().all()) for out in outs)


def test_a_trace_before_any_call_is_empty():
    trace = NegativeGuidance([Settings(prior=0.1), Settings(prior=0.2)]).trace()
    assert trace.sigmas.shape == (0,)
    assert trace.posterior.shape[0] == trace.scale.shape[0] == 0


def test_impossible_setups_are_refused():
    with pytest.raises(ValueError, match="at least one concept"):
        NegativeGuidance([])
    with pytest.raises(ValueError, match="priors"):
        NegativeGuidance([Settings(prior=0.5), Settings(prior=0.5)])
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="1 concepts were set up but 2"):
        NegativeGuidance([Settings()])(x, 1.0, x, x, [x, x])
