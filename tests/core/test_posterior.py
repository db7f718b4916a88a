"""Algorithm 2 against the paper's formula, and its step along paths worked out by hand."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dng_core.evidence import Call, divergence_evidence, gap_of_step, held_evidence, path_evidence
from dng_core.frames import VE, VP, NoiseFrame
from dng_core.guidance import NegativeGuidance
from dng_core.kernels import ReverseKernel
from dng_core.posterior import (
    EVIDENCE,
    LEAST_NOISE_FRACTION,
    STATES_KEPT,
    Chain,
    Path,
    PathPoint,
    offset_evidence,
    step,
)
from dng_core.schedules import DDPMSchedule, IntegratedOffset
from dng_core.settings import RULES, Settings

CHAIN = DDPMSchedule.named("linear")
OFFSET = IntegratedOffset(CHAIN)
WIDE = Settings(prior=0.3, p_min=1e-300, p_max=1 - 1e-12)  # no clamp to speak of
TIMESTEPS = [1, 2, 3, 10, 50, 123, 250, 400, 500, 640, 777, 900, 998, 999]


def ddpm_step(
    t: int, shape: Sequence[int] = (16, 3, 8, 8), apart: float = 0.3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A DDPM step t -> t - 1: VP states after and before it, and two random predictions of x_0, this far apart."""
    generator = torch.Generator().manual_seed(t)
    x_0, negative, noise, step_noise = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    negative = x_0 + apart * negative
    bar = CHAIN.alpha_bars[t]
    state = bar.sqrt() * x_0 + (1 - bar).sqrt() * noise
    next_state = reverse_mean(t, state, x_0) + CHAIN.posterior_variances[t - 1].sqrt() * step_noise
    return next_state, state, negative, x_0


def reverse_mean(t: int, state: Tensor, denoised: Tensor) -> Tensor:
    """mu of Ho et al., eq. 11: from the noise that the prediction implies, in the VP frame."""
    bar, beta = CHAIN.alpha_bars[t], CHAIN.betas[t]
    eps = (state - bar.sqrt() * denoised) / (1 - bar).sqrt()
    return (state - beta / (1 - bar).sqrt() * eps) / (1 - beta).sqrt()


def increment(
    next_state: Tensor,
    state: Tensor,
    negative: Tensor,
    reference: Tensor,
    next_level: float,
    level: float,
    frame: NoiseFrame = VE,
    weight: Tensor | None = None,
) -> Tensor:
    """What Algorithm 2 counts for a jump between states in ``frame``."""
    start = Call(frame.to_ve(state, level), frame.sigma(level), reference, negative)
    end = Call(frame.to_ve(next_state, next_level), frame.sigma(next_level))
    return held_evidence(start, end, start, weight)


def paper_increment(t: int, next_state: Tensor, state: Tensor, negative: Tensor, reference: Tensor) -> Tensor:
    """Algorithm 2's -1 / (2 sigma_t^2) (||x' - mu(c-)||^2 - ||x' - mu||^2), literally."""
    far = (next_state - reverse_mean(t, state, negative)).flatten(1).square().sum(1)
    near = (next_state - reverse_mean(t, state, reference)).flatten(1).square().sum(1)
    return -(far - near) / (2 * CHAIN.posterior_variances[t - 1])


def sigma(t: int) -> float:
    return float(CHAIN.sigmas[t])


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """The largest error of a batch, relative to its root mean square increment."""
    return float((ours - truth).abs().max() / truth.square().mean().sqrt())


@pytest.mark.parametrize("t", TIMESTEPS)
def test_increment_is_the_papers_in_float64_to_1e_10(t):
    jump = ddpm_step(t)
    ours = increment(*jump, sigma(t - 1), sigma(t), VP)
    assert relative_error(ours, paper_increment(t, *jump)) < 1e-10


@pytest.mark.parametrize("t", TIMESTEPS)
def test_increment_is_the_papers_in_float32_to_1e_4(t):
    jump = ddpm_step(t)
    ours = increment(*(x.float() for x in jump), sigma(t - 1), sigma(t), VP)
    assert ours.dtype == torch.float32
    assert relative_error(ours.double(), paper_increment(t, *jump)) < 1e-4


@pytest.mark.parametrize("form", ["integrated", "per_step"])
def test_a_tracked_step_is_algorithm_2_with_temperature_and_offset_in_either_form(form):
    settings = WIDE.with_(prior=1e-6, temperature=0.2, offset=2e-4, offset_form=form)
    for t in TIMESTEPS:
        # so close together that the posterior stays away from the clamp at every t
        next_state, state, negative, reference = jump = ddpm_step(t, apart=0.3 * sigma(t - 1))
        path, _ = step(Path(), Call(VP.to_ve(state, sigma(t)), sigma(t), reference, negative), settings, Chain())
        _, ours = step(path, Call(VP.to_ve(next_state, sigma(t - 1)), sigma(t - 1)), settings, Chain())
        tau_part = 0.2 * paper_increment(t, *jump)
        expected = math.log(1e-6) + tau_part + 2e-4 / (2 * CHAIN.posterior_variances[t - 1])
        assert relative_error(ours, expected) < 1e-10


@pytest.mark.parametrize("noise_scale", [1.0, 8.0])
def test_all_frames_give_the_same_increment_for_the_same_states(noise_scale):
    flow = NoiseFrame("flow", noise_scale)
    for t in TIMESTEPS:
        next_vp, vp, negative, reference = jump = ddpm_step(t)
        high, low = sigma(t), sigma(t - 1)
        ve, next_ve = vp * math.sqrt(1 + high**2), next_vp * math.sqrt(1 + low**2)
        level, next_level = high / (noise_scale + high), low / (noise_scale + low)
        truth = paper_increment(t, *jump)
        in_ve = increment(next_ve, ve, negative, reference, low, high, VE)
        in_flow = increment(next_ve * (1 - next_level), ve * (1 - level), negative, reference, next_level, level, flow)
        assert relative_error(in_ve, truth) < 1e-9
        assert relative_error(in_flow, truth) < 1e-9


@pytest.mark.parametrize("noise_scale", [1.0, 8.0])
def test_a_flow_increment_at_t_1_is_finite_and_the_limit_of_those_below(noise_scale):
    flow = NoiseFrame("flow", noise_scale)
    generator = torch.Generator().manual_seed(0)
    state, next_state, negative, reference = torch.randn(4, 8, 3, 4, 4, generator=generator, dtype=torch.float64)
    at_1 = increment(next_state, state, negative, reference, 0.95, 1.0, flow)
    # At infinite noise the kernel is N(D, sigma'^2), whatever the state was.
    x, low = next_state / 0.05, noise_scale * 0.95 / 0.05
    far, near = ((x - d).flatten(1).square().sum(1) for d in (negative, reference))
    torch.testing.assert_close(at_1, -(far - near) / (2 * low**2), rtol=1e-9, atol=1e-12)
    below = [increment(next_state, state, negative, reference, 0.95, 1 - gap, flow) for gap in (1e-3, 1e-6)]
    errors = [float((b - at_1).abs().max()) for b in below]
    assert errors[1] < 1e-4 and errors[1] < errors[0] / 100


@pytest.mark.parametrize("shape", [(4, 6), (4, 2, 5), (4, 2, 5, 3), (4, 2, 5, 3, 2)], ids=str)
def test_any_latent_rank_gives_the_same_increment_as_its_flat_form(shape):
    jump = ddpm_step(500, shape)
    flat = [x.flatten(1) for x in jump]
    ours = increment(*jump, sigma(499), sigma(500), VP)
    assert ours.shape == (4,)
    torch.testing.assert_close(ours, increment(*flat, sigma(499), sigma(500), VP), rtol=1e-12, atol=0)


def test_elements_of_weight_0_do_not_count():
    next_state, state, negative, reference = ddpm_step(500)
    weight = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    weight[..., :3] = 1
    inside = [x[..., :3] for x in (next_state, state, negative, reference)]
    nonsense = [torch.where(weight > 0, x, 1e3 * i) for i, x in enumerate((next_state, state, negative, reference))]
    torch.testing.assert_close(
        increment(*nonsense, sigma(499), sigma(500), VP, weight),
        increment(*inside, sigma(499), sigma(500), VP),
        rtol=1e-10,
        atol=0,
    )


def test_float16_states_are_accumulated_in_float32():
    # 65,536 elements of product 1 / 16: summed in float16 this would stall far below 4096.
    ones = torch.ones(1, 65536, dtype=torch.float16)
    ours = increment(ones / 16, ones * 0, ones, ones * 0, 0.5, 1.0)
    expected = 65536 * (1 / 16 - 0.75 / 2) / 0.25
    assert ours.dtype == torch.float32
    assert float(ours) == pytest.approx(expected, rel=1e-6)


def test_no_precision_is_lost_at_high_noise_in_float32():
    """At sigma 4518 and 65,000 elements, the difference of two norms loses 2e-3."""
    next_state, state, negative, reference = torch.randn(4, 4, 65000, generator=torch.Generator().manual_seed(0))
    negative = reference + 0.01 * negative
    state, next_state = 4518 * state, 4518 * state * (4000 / 4518) ** 2 + 1000 * next_state
    ours = increment(next_state, state, negative, reference, 4000.0, 4518.0)
    truth = increment(*(x.double() for x in (next_state, state, negative, reference)), 4000.0, 4518.0)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-9)


Said = tuple[Tensor, Tensor, Tensor]
"""A state, and the reference and the undesired prediction there."""


class Script:
    """A scripted sampler: random states and predictions, and the evidence of a jump by hand."""

    def __init__(self, shape: Sequence[int] = (3, 2, 4), seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.shape, self.dtype = tuple(shape), dtype

    def point(self) -> Said:
        x, negative, reference = torch.randn(3, *self.shape, generator=self.generator, dtype=self.dtype)
        return x, reference, reference + 0.2 * negative

    @staticmethod
    def jump(start: Said, x: Tensor, low: float, high: float) -> Tensor:
        """log of the ratio of two normal densities, written with the kernel's mean and variance."""
        kernel = ReverseKernel(high, low)
        reference, negative = (
            torch.distributions.Normal(kernel.mean(start[0], d), kernel.variance**0.5).log_prob(x).flatten(1).sum(1)
            for d in start[1:]
        )
        return negative - reference


class Walk:
    """An unguided run: the path so far, and what `step` answers to each call."""

    def __init__(self, levels: Sequence[float] | None, settings: Settings = WIDE, **known: Any) -> None:
        self.path, self.settings, self.chain = Path(), settings, Chain(levels, OFFSET, **known)

    def visit(self, point: Said | tuple[Tensor], sigma: float, gap: Tensor | None = None) -> Tensor:
        call = Call(point[0], sigma, *point[1:], gap=gap)
        path, log_p = step(self.path, call, self.settings, self.chain)
        self.path = dataclasses.replace(path, guided=call.reference)
        return log_p

    @property
    def sigmas(self) -> list[float]:
        return [point.sigma for point in self.path.points]


def test_the_path_starts_at_the_prior_and_adds_every_jump():
    script, walk = Script(), Walk([4.0, 2.0, 1.0])
    a, b, c = script.point(), script.point(), script.point()
    assert walk.visit(a, 4.0).exp().tolist() == pytest.approx([0.3] * 3)
    at_b = math.log(0.3) + script.jump(a, b[0], 2.0, 4.0)
    torch.testing.assert_close(walk.visit(b, 2.0), at_b, rtol=1e-10, atol=0)
    torch.testing.assert_close(walk.visit(c, 1.0), at_b + script.jump(b, c[0], 1.0, 2.0), rtol=1e-10, atol=0)


def test_a_corrected_point_replaces_its_trial():
    """Heun: a trial at the next level, then the corrected state there; the path goes on from the corrected one."""
    script, walk = Script(), Walk([4.0, 2.0, 1.0])
    a, trial, corrected, c = (script.point() for _ in range(4))
    walk.visit(a, 4.0)
    walk.visit(trial, 2.0)
    at_corrected = math.log(0.3) + script.jump(a, corrected[0], 2.0, 4.0)
    torch.testing.assert_close(walk.visit(corrected, 2.0), at_corrected, rtol=1e-10, atol=0)
    assert walk.sigmas == [4.0, 2.0]
    expected = at_corrected + script.jump(corrected, c[0], 1.0, 2.0)
    torch.testing.assert_close(walk.visit(c, 1.0), expected, rtol=1e-10, atol=0)


def test_a_trial_point_without_noise_keeps_the_posterior_of_its_step():
    """dpm_2_ancestral: at every level a trial first, then the step itself, whose evidence counts."""
    script, walk = Script(), Walk([4.0, 2.0, 1.0], trial_points=True)
    a, trial, b, other_trial = (script.point() for _ in range(4))
    at_a = walk.visit(a, 4.0)
    assert torch.equal(walk.visit(trial, 2.0 * (1 + 3e-6)), at_a)
    at_b = walk.visit(b, 2.0)
    torch.testing.assert_close(at_b, at_a + script.jump(a, b[0], 2.0, 4.0), rtol=1e-10, atol=0)
    assert torch.equal(walk.visit(other_trial, 1.0), at_b)
    assert not torch.equal(walk.visit(script.point()[:1], 0.5), at_b)  # the run ends here, no trial


@pytest.mark.parametrize("rounding", [1 + 3e-6, 1 - 3e-6])
def test_a_trial_a_few_units_of_rounding_off_its_level_is_replaced_too(rounding):
    """dpmpp_2s_ancestral reaches the next level's sigma as its midpoint, by another formula."""
    script, walk = Script(), Walk([4.0, 2.0, 1.0])
    a, trial, b = (script.point() for _ in range(3))
    walk.visit(a, 4.0)
    walk.visit(trial, 2.0 * rounding)
    at_b = walk.visit(b, 2.0)
    torch.testing.assert_close(at_b, math.log(0.3) + script.jump(a, b[0], 2.0, 4.0), rtol=1e-10, atol=0)
    assert walk.sigmas == [4.0, 2.0]


def test_midpoints_get_a_posterior_but_no_jump_starts_there():
    script, walk = Script(), Walk([4.0, 2.0])
    a, middle, b = (script.point() for _ in range(3))
    walk.visit(a, 4.0)
    at_middle = walk.visit(middle, 3.0)
    torch.testing.assert_close(at_middle, math.log(0.3) + script.jump(a, middle[0], 3.0, 4.0), rtol=1e-10, atol=0)
    at_b = walk.visit(b, 2.0)
    torch.testing.assert_close(at_b, math.log(0.3) + script.jump(a, b[0], 2.0, 4.0), rtol=1e-10, atol=0)
    assert walk.sigmas == [4.0, 2.0]


def test_levels_match_the_schedule_through_float32_rounding_but_not_a_neighbour():
    script, walk = Script(), Walk([157.407, 14.6, 0.1])
    for sigma in (157.407, 14.6 * (1 + 3e-7), 0.1 * (1 + 1e-3)):
        walk.visit(script.point(), sigma)
    assert walk.sigmas == [157.407, 14.6 * (1 + 3e-7)]


def test_the_first_call_is_a_point_of_the_path_even_off_the_schedule():
    script, walk = Script(), Walk([4.0, 2.0])
    a, b = script.point(), script.point()
    walk.visit(a, 3.9)
    expected = math.log(0.3) + script.jump(a, b[0], 2.0, 3.9)
    torch.testing.assert_close(walk.visit(b, 2.0), expected, rtol=1e-10, atol=0)


def test_with_adaptive_samplers_every_call_is_a_point_and_a_rejected_step_is_forgotten():
    script, walk = Script(), Walk(None)
    a, too_far, b, c = (script.point() for _ in range(4))
    walk.visit(a, 4.0)
    walk.visit(too_far, 0.7)
    at_b = math.log(0.3) + script.jump(a, b[0], 2.3, 4.0)
    torch.testing.assert_close(walk.visit(b, 2.3), at_b, rtol=1e-10, atol=0)
    torch.testing.assert_close(walk.visit(c, 0.6), at_b + script.jump(b, c[0], 0.6, 2.3), rtol=1e-10, atol=0)
    assert walk.sigmas == [4.0, 2.3, 0.6]


def test_a_level_that_was_not_called_is_jumped_over():
    """No undesired prediction at 2.0: the next posterior comes from one kernel over both steps."""
    script, walk = Script(), Walk([4.0, 2.0, 1.0])
    a, _, c = (script.point() for _ in range(3))
    walk.visit(a, 4.0)
    expected = math.log(0.3) + script.jump(a, c[0], 1.0, 4.0)
    torch.testing.assert_close(walk.visit(c, 1.0), expected, rtol=1e-10, atol=0)


def test_a_jump_from_where_the_concept_does_not_apply_keeps_the_posterior():
    script, walk = Script(), Walk([4.0, 2.0, 1.0, 0.5], WIDE.with_(prior=1e-9, offset=1.0, offset_form="total"))
    a, b, c, d = (script.point() for _ in range(4))
    walk.visit(a, 4.0)
    at_b = walk.visit(b[:2], 2.0)
    assert torch.equal(walk.visit(c, 1.0), at_b)
    assert [point.applies for point in walk.path.points] == [True, False, True]
    expected = at_b + script.jump(c, d[0], 0.5, 1.0) + offset_evidence(walk.settings, ReverseKernel(1.0, 0.5), OFFSET)
    torch.testing.assert_close(walk.visit(d, 0.5), expected, rtol=1e-10, atol=0)


def test_calling_again_at_the_first_point_keeps_its_posterior_and_more_noise_starts_afresh():
    script = Script()
    for sigma, start in ((4.0, 0.7), (9.0, 0.3)):
        walk = Walk([4.0, 2.0, 1.0])
        a, b = script.point(), script.point()
        first = PathPoint(4.0, torch.full((3,), math.log(0.7)), torch.zeros(3), True, Call(a[0], 4.0, *a[1:]))
        walk.path = Path((first,))
        walk.visit(b, 2.0)
        assert walk.visit(a, sigma).exp().tolist() == pytest.approx([start] * 3)
        assert walk.sigmas == [sigma]


def test_rising_noise_goes_back_to_the_last_point_above_it():
    script, walk = Script(), Walk([4.0, 2.0, 1.0])
    a, b, c, again = (script.point() for _ in range(4))
    for point, sigma in ((a, 4.0), (b, 2.0), (c, 1.0)):
        walk.visit(point, sigma)
    expected = math.log(0.3) + script.jump(a, again[0], 2.0, 4.0)
    torch.testing.assert_close(walk.visit(again, 2.0), expected, rtol=1e-10, atol=0)


def test_a_call_at_zero_noise_keeps_the_posterior_of_the_step_before():
    script = Script()
    for form in ("integrated", "per_step"):
        walk = Walk([4.0, 2.0], WIDE.with_(offset=1e-3, offset_form=form))
        walk.visit(script.point(), 4.0)
        before = walk.visit(script.point(), 2.0)
        torch.testing.assert_close(walk.visit(script.point(), 0.0), before)


def test_a_thousand_points_keep_few_states():
    script, levels = Script(), [float(1000 - i) for i in range(1000)]
    walk = Walk(levels)
    for sigma in levels:
        walk.visit(script.point(), sigma)
    assert walk.sigmas == levels
    assert [point.sigma for point in walk.path.points if point.call is not None] == levels[-STATES_KEPT:]
    assert all(point.log_p.shape == (3,) for point in walk.path.points)


def test_posteriors_are_clamped_and_recover():
    walk = Walk([4.0, 2.0, 1.0], WIDE.with_(p_min=0.01, p_max=0.6))
    far = torch.tensor([[1000.0], [-1000.0]])  # towards the undesired mean, and away from it
    said = torch.zeros(2, 1), torch.ones(2, 1)
    walk.visit((torch.zeros(2, 1), *said), 4.0)
    assert walk.visit((far, *said), 2.0).exp().tolist() == pytest.approx([0.6, 0.01])
    assert walk.visit((-far, *said), 1.0).exp().tolist() == pytest.approx([0.01, 0.6])


def test_the_tracked_offset_is_added_at_every_jump():
    settings = WIDE.with_(prior=1e-6, offset=5.0, offset_form="total")
    walk = Walk([4.0, 2.0, 1.0], settings)
    x, reference, _ = Script().point()
    total = math.log(1e-6)
    walk.visit((x, reference, reference), 4.0)
    for high, low in itertools.pairwise((4.0, 2.0, 1.0)):
        total += offset_evidence(settings, ReverseKernel(high, low), OFFSET)
        assert walk.visit((x, reference, reference), low).tolist() == pytest.approx([total] * 3)


def test_images_of_a_batch_do_not_touch_one_another():
    script = Script(seed=5)
    points = [script.point() for _ in range(4)]
    levels = [4.0, 2.0, 1.0, 0.5]
    together = Walk(levels)
    batch = [together.visit(point, sigma) for point, sigma in zip(points, levels, strict=True)]
    for i in range(3):
        alone = Walk(levels)
        for (x, reference, negative), sigma, expected in zip(points, levels, batch, strict=True):
            ours = alone.visit((x[i : i + 1], reference[i : i + 1], negative[i : i + 1]), sigma)
            torch.testing.assert_close(ours, expected[i : i + 1], rtol=1e-12, atol=0)


def test_start_values_can_be_given_per_image():
    start = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64).log()
    _, log_p = step(Path(log_prior=start), Call(Script().point()[0], 4.0), WIDE, Chain([4.0]))
    assert torch.equal(log_p, start)


def test_tracking_is_deterministic():
    runs = []
    for _ in range(2):
        script = Script(dtype=torch.float32, seed=3)
        guidance = NegativeGuidance([Settings()], Chain([4.0, 2.0, 1.0]))
        for sigma in (4.0, 2.0, 1.0):
            x, reference, negative = script.point()
            guidance(x, sigma, reference, reference, [negative])
        runs.append(guidance.trace())
    assert torch.equal(runs[0].posterior, runs[1].posterior)
    assert torch.equal(runs[0].scale, runs[1].scale)


def walked(rule: str, levels: Sequence[float] = (4.0, 3.0, 2.4), **known: Any) -> tuple[list[Call], list[Tensor]]:
    """A run by a rule, which ends at the last level without predictions: its calls and posteriors."""
    script, walk = Script(), Walk(levels, WIDE.with_(rule=rule, prior=1e-30), **known)
    points = [script.point()[: 1 if sigma == levels[-1] else 3] for sigma in levels]
    gaps = torch.randn(len(levels), 3, generator=script.generator, dtype=script.dtype)
    logs = [walk.visit(*said) for said in zip(points, levels, gaps, strict=True)]
    return [point.call for point in walk.path.points], logs


def test_every_rule_is_tested_below():
    assert set(EVIDENCE) == set(RULES) == {"algorithm_2", "step_noise", "probe"}


@pytest.mark.parametrize("fraction", [None, 0.0, 0.5, 1.0])
def test_the_rule_algorithm_2_holds_the_predictions_before_a_jump_whatever_else_is_known(fraction):
    (a, b, end), logs = walked("algorithm_2", noise_fraction=None if fraction is None else lambda *sigmas: fraction)
    for start, there, log_start, log_there in ((a, b, *logs[:2]), (b, end, *logs[1:])):
        by_hand = Script.jump((start.x, start.reference, start.negative), there.x, there.sigma, start.sigma)
        torch.testing.assert_close(log_there, log_start + by_hand, rtol=1e-10, atol=0)


def test_the_rule_step_noise_takes_both_ends_and_the_gap_that_the_noise_of_the_steps_shows():
    (a, b, c, _), logs = walked("step_noise", (4.0, 3.0, 2.4, 1.0), noise_fraction=lambda *sigmas: 0.9)
    first, second = gap_of_step(a, b, a.reference, 0.9), gap_of_step(b, c, b.reference, 0.9)
    torch.testing.assert_close(logs[1], logs[0] + path_evidence(a, b, first), rtol=1e-10, atol=0)
    faded = (2.4 / 3.0) ** 4
    averaged = faded * first + (1 - faded) * second
    torch.testing.assert_close(logs[2], logs[1] + path_evidence(b, c, averaged), rtol=1e-10, atol=0)


def test_the_rule_step_noise_forgets_a_fifth_of_the_steps_before_however_short_the_step():
    (a, b, c, _), logs = walked("step_noise", (4.0, 3.0, 2.999, 1.0), noise_fraction=lambda *sigmas: 0.9)
    averaged = 0.8 * gap_of_step(a, b, a.reference, 0.9) + 0.2 * gap_of_step(b, c, b.reference, 0.9)
    torch.testing.assert_close(logs[2], logs[1] + path_evidence(b, c, averaged), rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("levels", "fraction"),
    [
        ((4.0, 3.0, 2.4), None),
        ((4.0, 3.0, 2.4), LEAST_NOISE_FRACTION - 1e-6),
        ((math.inf, 3.0), 1.0),
    ],
    ids=["unknown noise", "little noise", "from infinite noise"],
)
def test_where_a_steps_noise_says_nothing_step_noise_is_algorithm_2(levels, fraction):
    known = {} if fraction is None else {"noise_fraction": lambda *sigmas: fraction}
    plain, ours = (walked(rule, (*levels, 1.0), **known)[1] for rule in ("algorithm_2", "step_noise"))
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_at_a_midpoint_step_noise_is_algorithm_2():
    logs = []
    for rule in ("algorithm_2", "step_noise"):
        script, walk = Script(), Walk([4.0, 2.0], WIDE.with_(rule=rule), noise_fraction=lambda *sigmas: 1.0)
        logs.append([walk.visit(script.point(), sigma) for sigma in (4.0, 3.0)])
    torch.testing.assert_close(*logs, rtol=0, atol=0)


@pytest.mark.parametrize("fraction", [0.0, 0.6, 1.0, None])
def test_the_rule_probe_takes_both_ends_and_the_mean_of_the_probed_gaps(fraction):
    """At the end, it takes the last predictions, less the divergence's evidence times the missing share of noise."""
    (a, b, end), logs = walked("probe", noise_fraction=None if fraction is None else lambda *sigmas: fraction)
    torch.testing.assert_close(logs[1], logs[0] + path_evidence(a, b, (a.gap + b.gap) / 2), rtol=1e-10, atol=0)
    lacking = 0.0 if fraction is None else 1 - fraction
    expected = held_evidence(b, end, b) - lacking * divergence_evidence(b, end, b.gap)
    torch.testing.assert_close(logs[2], logs[1] + expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_by_no_rule_do_elements_of_weight_0_count(rule):
    weight, logs = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64), []
    for nonsense in (0.0, 1e3):
        script = Script()
        walk = Walk(None, WIDE.with_(rule=rule, prior=1e-30), weight=weight, noise_fraction=lambda *sigmas: 0.9)
        for sigma in (4.0, 3.0, 2.4):
            point = [torch.where(weight > 0, x, i * nonsense / sigma) for i, x in enumerate(script.point(), start=1)]
            log_p = walk.visit(point, sigma, torch.ones(3))
        logs.append(log_p)
    torch.testing.assert_close(*logs, rtol=1e-12, atol=0)


def test_a_trial_that_is_probed_counts_by_the_rule_probe_alone():
    for rule in RULES:
        script, walk = Script(), Walk([4.0, 2.0], WIDE.with_(rule=rule), trial_points=True)
        at_a = walk.visit(script.point(), 4.0, torch.ones(3))
        assert torch.equal(walk.visit(script.point(), 2.0, torch.ones(3)), at_a) == (rule != "probe")


def bits(value: Any) -> Any:
    """A value with every tensor inside it as its bytes, to be compared exactly."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if dataclasses.is_dataclass(value):
        return tuple(bits(getattr(value, field.name)) for field in dataclasses.fields(value))
    return tuple(bits(part) for part in value) if isinstance(value, tuple | list) else value


LEVELS = [4.0, 2.5, 2.0, 1.1, 1.0, 0.6]
CALLS = st.tuples(
    st.sampled_from([math.inf, 9.0, *LEVELS, *(level * (1 + 3e-6) for level in LEVELS), 3.0, 1.5, 0.8, 0.0]),
    st.sampled_from(["predictions", "gap", "gap", "reference", "nothing"]),
)


@pytest.mark.parametrize("rule", RULES)
@hypothesis.settings(deadline=None)
@hypothesis.given(
    calls=st.lists(CALLS, min_size=1, max_size=12),
    falling=st.booleans(),
    adaptive=st.booleans(),
    trial_points=st.booleans(),
    fraction=st.sampled_from([0.8, 0.1, None]),
)
def test_step_answers_a_question_asked_twice_the_same_and_changes_nothing(
    rule, calls, falling, adaptive, trial_points, fraction
):
    """Midpoints, trials, steps back and fresh starts in any order: a path is a value, and there is no other state."""
    script, settings = Script(), Settings(rule=rule, offset=1.0, offset_form="total")
    noise_fraction = None if fraction is None else lambda *sigmas: fraction
    weight = torch.rand(1, 2, 4, generator=script.generator, dtype=torch.float64)
    chain = Chain(None if adaptive else LEVELS, OFFSET, weight, noise_fraction, trial_points)
    path = Path()
    for sigma, known in sorted(calls, reverse=True) if falling else calls:
        x, reference, negative = script.point()
        said = {"reference": (reference,), "nothing": ()}.get(known, (reference, negative))
        call = Call(x, sigma, *said, gap=torch.randn(3, generator=script.generator) if known == "gap" else None)
        before = bits((path, call, weight))
        went_on, log_p = step(path, call, settings, chain)
        assert bits((path, call, weight)) == before
        assert bits(step(path, call, settings, chain)) == bits((went_on, log_p))
        assert bool(log_p.isfinite().all())
        path = dataclasses.replace(went_on, guided=reference)
