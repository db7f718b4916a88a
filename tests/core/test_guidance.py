"""How predictions are combined: DNG, negative prompting and Safe Latent Diffusion, by their formulas."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dng_core.baselines import BaselineGuidance, NegativePrompting, SafeLatentDiffusion, safe_latent_direction
from dng_core.evidence import Foretold
from dng_core.frames import VE, NoiseFrame
from dng_core.guidance import Guidance, NegativeGuidance, Trace, combine, dynamic_scales
from dng_core.methods import STUDIED, MethodSettings, guidance_by
from dng_core.posterior import Chain
from dng_core.settings import RULES, Settings

WIDE = Settings(prior=0.3, p_min=1e-30, p_max=1 - 1e-9, max_scale=math.inf)


def tensors(count: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def log(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


def test_dynamic_scale_is_lambda_0_p_over_1_minus_p():
    p = [0.001, 0.2, 0.5, 0.9, 0.999]
    (scale,) = dynamic_scales([log(*p)], [WIDE.with_(guidance_scale=3.0)], 1.0)
    assert scale.tolist() == pytest.approx([3 * q / (1 - q) for q in p], rel=1e-9)


def test_the_cap_applies_to_the_product():
    (scale,) = dynamic_scales([log(0.2, 0.9)], [WIDE.with_(guidance_scale=4.0, max_scale=5.0)], 1.0)
    assert scale.tolist() == pytest.approx([1.0, 5.0])


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_above_its_level_a_scale_above_1_amplifies_only_what_exceeds_the_prior_odds(scale):
    settings = WIDE.with_(guidance_scale=scale, prior=0.2, evidence_above=10.0)
    posteriors = [0.1, 0.2, 0.5]  # odds 1/9, 1/4 (the prior's), 1
    (above,), (below,) = (dynamic_scales([log(*posteriors)], [settings], sigma) for sigma in (10.1, 10.0))
    odds = torch.tensor([1 / 9, 1 / 4, 1.0], dtype=torch.float64)
    evidence = torch.tensor([0.0, 0.0, 3 / 4], dtype=torch.float64)
    torch.testing.assert_close(below, scale * odds)
    torch.testing.assert_close(above, min(scale, 1.0) * odds + max(scale - 1, 0.0) * evidence)


def test_the_prior_odds_of_several_concepts_are_over_the_chance_that_none_is_there():
    settings = [WIDE.with_(guidance_scale=3.0, prior=p, evidence_above=10.0) for p in (0.1, 0.4)]
    scales = dynamic_scales([log(0.1), log(0.4)], settings, 20.0)
    assert [float(scale) for scale in scales] == pytest.approx([0.1 / 0.5, 0.4 / 0.5])


def test_the_scales_of_several_steps_are_those_of_each():
    settings = WIDE.with_(guidance_scale=4.0, prior=0.2, evidence_above=10.0)
    steps, levels = torch.stack([log(0.2, 0.5), log(0.1, 0.6), log(0.3, 0.9)]), [20.0, 10.1, 2.0]
    (together,) = dynamic_scales([steps], [settings], levels)
    alone = [dynamic_scales([log_p], [settings], level)[0] for log_p, level in zip(steps, levels, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=0)


def test_the_trace_holds_the_scales_that_pushed_on_both_sides_of_the_level():
    settings = Settings(guidance_scale=4.0, prior=0.2, evidence_above=10.0)
    guidance = NegativeGuidance([settings])
    base, negative = tensors(2, 3, 16)
    pushed = []
    for x, sigma in zip(tensors(2, 3, 16, seed=1), (20.0, 5.0), strict=True):
        guided = guidance(sigma * x, sigma, base, base, [negative])
        pushed.append(((base - guided) / (negative - base))[:, 0])
    torch.testing.assert_close(guidance.trace().scale[:, 0], torch.stack(pushed).float())
    torch.testing.assert_close(pushed[0], torch.full((3,), 0.25, dtype=torch.float64))


def test_several_concepts_share_what_is_absent_of_all():
    scales = dynamic_scales([log(0.1, 0.3), log(0.2, 0.5)], [WIDE, WIDE.with_(guidance_scale=2.0)], 1.0)
    assert scales[0].tolist() == pytest.approx([0.1 / 0.7, 0.3 / 0.2])
    assert scales[1].tolist() == pytest.approx([2 * 0.2 / 0.7, 2 * 0.5 / 0.2])


def test_posteriors_that_sum_above_p_max_are_rescaled_together():
    settings = WIDE.with_(p_max=0.9)
    scales = dynamic_scales([log(0.8), log(0.4)], [settings, settings], 1.0)
    assert [float(s) for s in scales] == pytest.approx([0.6 / 0.1, 0.3 / 0.1])


def test_exact_scales_of_two_exclusive_concepts_leave_the_mixture_of_the_rest():
    """p(x | neither) has the denoiser D - sum lambda_i (D_i - D), whatever the three parts."""
    shares = [0.2, 0.3, 0.5]
    parts = tensors(3, 1, 4)
    whole = sum((s * d for s, d in zip(shares, parts, strict=True)), torch.zeros(1, 4, dtype=torch.float64))
    scales = dynamic_scales([log(0.2), log(0.3)], [WIDE, WIDE], 1.0)
    torch.testing.assert_close(combine(whole, [parts[0] - whole, parts[1] - whole], scales), parts[2])


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
    settings: Sequence[MethodSettings], levels: Sequence[float], points: Sequence[Tensor], frame: NoiseFrame = VE
) -> tuple[list[Tensor], Guidance]:
    """Run over points (state, base, reference, one prediction per concept): the outputs, and the guidance."""
    guidance = guidance_by(settings, Chain([frame.sigma(level) for level in levels]))
    outs = [
        guidance(frame.to_ve(point[0], level), frame.sigma(level), point[1], point[2], list(point[3:]))
        for point, level in zip(points, levels, strict=True)
    ]
    return outs, guidance


def test_dng_pushes_the_base_by_the_tracked_scale_along_negative_minus_reference():
    points = [tensors(4, 5, 2, 4, seed=s) * 0.3 for s in range(3)]
    outs, guidance = guide([WIDE.with_(guidance_scale=2.0)], [4.0, 2.0, 1.0], points)
    tracked = guidance.paths[0].points
    assert not torch.allclose(tracked[1].log_p, tracked[0].log_p)
    for point, out, there in zip(points, outs, tracked, strict=True):
        p = there.log_p.exp()[:, None, None]
        torch.testing.assert_close(out, point[1] - 2 * p / (1 - p) * (point[3] - point[2]))


def test_negative_prompting_pushes_by_a_constant_whatever_the_state():
    points = [tensors(4, 5, 2, 4, seed=s) for s in range(3)]
    outs, _ = guide([NegativePrompting(1.5)], [4.0, 2.0, 1.0], points)
    for point, out in zip(points, outs, strict=True):
        torch.testing.assert_close(out, point[1] - 1.5 * (point[3] - point[2]))


@pytest.mark.parametrize("threshold", [0.04, math.inf])
def test_safe_latent_diffusion_is_its_formula_in_noise_predictions(threshold):
    """eps_hat = eps - lambda g over three steps, literally, and brought back to a denoised prediction."""
    settings = SafeLatentDiffusion(guidance_scale=7.0, threshold=threshold)
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
    direction, kept = safe_latent_direction(difference, math.inf, momentum, SafeLatentDiffusion())
    assert not direction.any()
    assert torch.equal(kept, momentum)


def test_concepts_of_one_method_add_up():
    point = tensors(5, 3, 2, 2)
    first, second = point[3] - point[2], point[4] - point[2]
    (out,), _ = guide([NegativePrompting(1.5), NegativePrompting(0.5)], [4.0], [point])
    torch.testing.assert_close(out, point[1] - 1.5 * first - 0.5 * second)
    (out,), _ = guide([WIDE.with_(prior=0.25), WIDE], [4.0], [point])
    torch.testing.assert_close(out, point[1] - 0.25 / 0.45 * first - 0.3 / 0.45 * second)


def test_concepts_of_different_methods_are_refused():
    for a, b in itertools.permutations((Settings(), NegativePrompting(), SafeLatentDiffusion()), 2):
        with pytest.raises(ValueError, match="one method, not .*" + ", ".join(sorted((a.method, b.method)))):
            guidance_by([a, a, b])


def test_every_method_is_run_by_its_name_and_the_baselines_track_no_posterior():
    points = [tensors(4, 5, 2, 4, seed=s) for s in range(3)]
    kinds = {
        "dng": NegativeGuidance,
        "negative_prompting": BaselineGuidance,
        "safe_latent_diffusion": BaselineGuidance,
        "contrastive_cfg": BaselineGuidance,
    }
    assert STUDIED.keys() == kinds.keys()
    for method, settings in STUDIED.items():
        _, guidance = guide([settings()], [4.0, 2.0, 1.0], points)
        assert type(guidance) is kinds[method] and settings.method == method
        trace = guidance.trace((points[0][0], 0.5))
        assert isinstance(trace, Trace) if method == "dng" else trace is None
        assert method == "dng" or guidance.probe(points[0][0], 0.5) is None


@pytest.mark.parametrize("method", STUDIED)
def test_a_negative_equal_to_the_reference_changes_nothing(method):
    x, base, reference = tensors(3, 2, 3, 4, dtype=torch.float32)
    outs, guidance = guide([STUDIED[method]()], [4.0, 2.0], [torch.stack([x, base, reference, reference])] * 2)
    assert all(torch.equal(out, base) for out in outs)
    if method == "dng":
        torch.testing.assert_close(guidance.trace().posterior, torch.full((2, 1, 2), 0.2))


@pytest.mark.parametrize("method", STUDIED)
def test_what_is_not_finite_in_an_undesired_prediction_does_not_push_and_is_told(method):
    point = tensors(4, 2, 3, 4)
    point[3, 0, 0, :2] = torch.tensor([math.nan, math.inf])
    repaired = torch.where(point.isfinite(), point, point[2])
    (out,), guidance = guide([STUDIED[method]()], [4.0], [point])
    (wanted,), fine = guide([STUDIED[method]()], [4.0], [repaired])
    assert torch.equal(out, wanted)
    assert guidance.ignored() and not fine.ignored()


@pytest.mark.parametrize("shape", [(2, 6), (2, 2, 3), (2, 1, 2, 3), (2, 1, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("method", STUDIED)
def test_any_latent_rank_gives_the_same_result(shape, method):
    points = [tensors(4, 2, 6, seed=s) for s in range(2)]
    flat, _ = guide([STUDIED[method]()], [4.0, 2.0], points)
    shaped, _ = guide([STUDIED[method]()], [4.0, 2.0], [p.reshape(4, *shape) for p in points])
    for a, b in zip(flat, shaped, strict=True):
        torch.testing.assert_close(b.reshape(2, 6), a)


@pytest.mark.parametrize("method", STUDIED)
def test_a_batch_of_three_is_three_batches_of_one(method):
    points = [tensors(4, 3, 2, 4, seed=s) * 0.3 for s in range(4)]
    levels = [4.0, 2.0, 1.0, 0.5]
    together, _ = guide([STUDIED[method]()], levels, points)
    for i in range(3):
        alone, _ = guide([STUDIED[method]()], levels, [p[:, i : i + 1] for p in points])
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(part, whole[i : i + 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_is_tracked_in_float32_and_half_precision_out(dtype):
    points = [tensors(4, 2, 1, 64, 64, seed=s, dtype=torch.float32).mul(0.1).to(dtype) for s in range(3)]
    halves, half = guide([Settings()], [4.0, 2.0, 1.0], points)
    wholes, whole = guide([Settings()], [4.0, 2.0, 1.0], [p.float() for p in points])
    assert {out.dtype for out in halves} == {dtype}
    assert {point.log_p.dtype for point in half.paths[0].points} == {torch.float32}
    torch.testing.assert_close(half.trace().posterior, whole.trace().posterior, rtol=1e-5, atol=1e-7)
    for a, b in zip(halves, wholes, strict=True):
        assert torch.equal(a, b.to(dtype))


@pytest.mark.parametrize("rule", RULES)
def test_the_callers_tensors_may_be_overwritten_after_a_call(rule):
    """Samplers reuse their buffers: the path must not see what is written into them later."""
    settings = WIDE.with_(rule=rule)
    points = [tensors(4, 2, 3, 4, seed=s, dtype=torch.float32) * 0.3 for s in range(2)]
    chain = Chain([4.0, 2.0], noise_fraction=lambda *sigmas: 1.0)
    overwritten, left = (NegativeGuidance([settings], chain) for _ in range(2))
    for (x, base, reference, negative), sigma in zip(points, [4.0, 2.0], strict=True):
        wanted = left(x, sigma, base, reference, [negative]).clone()
        buffers = [tensor.clone() for tensor in (x, base, reference, negative)]
        out = overwritten(buffers[0], sigma, *buffers[1:3], buffers[3:])
        torch.testing.assert_close(out, wanted)
        for buffer in (*buffers, out):
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


def test_of_a_concept_that_does_not_apply_the_trace_holds_no_scale():
    points = [tensors(4, 2, 3, seed=s) for s in range(2)]
    guidance = NegativeGuidance([Settings(), Settings(prior=0.1)], Chain([4.0, 2.0]))
    for (x, base, reference, negative), sigma, applies in zip(points, [4.0, 2.0], [False, True], strict=True):
        out = guidance(x, sigma, base, reference, [None, negative if applies else None])
        assert torch.equal(out, base) != applies
    assert [bool(scale) for scale in guidance.trace().scale.flatten(1).T[2]] == [False, True]
    assert not guidance.trace().scale[:, 0].any() and guidance.trace().posterior.all()


@pytest.mark.parametrize("rule", RULES)
def test_a_trace_with_its_end_is_a_question(rule):
    """Asked twice it answers the same, and neither a later trace nor the run that goes on knows that it was asked."""
    points = [tensors(4, 2, 3, seed=s) * 0.3 for s in range(4)]
    levels, settings = [4.0, 3.0, 2.0, 1.0], [WIDE.with_(rule=rule)]
    asked, left = (NegativeGuidance(settings, Chain(levels, noise_fraction=lambda *sigmas: 0.8)) for _ in range(2))
    for (x, base, reference, negative), sigma in zip(points, levels, strict=True):
        outs = [guidance(x, sigma, base, reference, [negative]) for guidance in (asked, left)]
        assert torch.equal(*outs)
        for end in (0.0, 0.7 * sigma, sigma, 2.5):
            first, second = (asked.trace((points[0][0], end)) for _ in range(2))
            assert_same_trace(first, second)
            assert first.log_posterior is not None and first.log_posterior.shape == (1, 2)
            assert_same_trace(dataclasses.replace(first, log_posterior=None, foretold=None), left.trace())
        assert_same_trace(asked.trace(), left.trace())
    assert asked.trace().sigmas.tolist() == levels
    assert not torch.equal(first.log_posterior, asked.trace((points[0][0], 0.7)).log_posterior)


def assert_same_trace(a: Trace, b: Trace) -> None:
    for field in dataclasses.fields(Trace):
        ours, theirs = getattr(a, field.name), getattr(b, field.name)
        if field.name == "foretold":
            assert_same_foretold(ours, theirs)
        else:
            same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
            assert same, field.name


def assert_same_foretold(a: tuple[Foretold | None, ...] | None, b: tuple[Foretold | None, ...] | None) -> None:
    assert (a is None) == (b is None)
    for ours, theirs in zip(a or (), b or (), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or all(torch.equal(*values) for values in zip(ours, theirs, strict=True))


def test_a_run_that_goes_on_from_where_another_stopped_is_one_run_with_it():
    points = [tensors(4, 2, 3, seed=s) * 0.3 for s in range(4)]
    levels = [4.0, 3.0, 2.0, 1.0]
    _, whole = guide([WIDE], levels, points)
    _, first = guide([WIDE], levels[:2], points[:2])
    stopped = first.trace((points[2][0], 2.0))
    second = NegativeGuidance([WIDE], Chain(levels[2:]), stopped.log_posterior.double())
    for (x, base, reference, negative), sigma in zip(points[2:], levels[2:], strict=True):
        second(x, sigma, base, reference, [negative])
    joined = stopped.then(second.trace())
    assert torch.equal(joined.sigmas, whole.trace().sigmas)
    torch.testing.assert_close(joined.posterior, whole.trace().posterior, rtol=1e-5, atol=0)


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
    for settings in STUDIED.values():
        with pytest.raises(ValueError, match="1 concepts were set up but 2"):
            guidance_by([settings()])(x, 1.0, x, x, [x, x])
