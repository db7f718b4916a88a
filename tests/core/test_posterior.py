"""The posterior recursion against the paper's formula, and the tracker against a chain worked out by hand."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dng_core.guidance import NegativeGuidance
from dng_core.kernels import VE, VP, NoiseFrame, ReverseKernel
from dng_core.posterior import MAX_ANCHOR_STATES, PosteriorTracker, offset_increment, posterior_increment
from dng_core.schedules import DDPMSchedule, IntegratedOffset
from dng_core.settings import Settings

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
    step = ddpm_step(t)
    ours = posterior_increment(*step, sigma(t - 1), sigma(t), VP)
    assert relative_error(ours, paper_increment(t, *step)) < 1e-10


@pytest.mark.parametrize("t", TIMESTEPS)
def test_increment_is_the_papers_in_float32_to_1e_4(t):
    step = ddpm_step(t)
    ours = posterior_increment(*(x.float() for x in step), sigma(t - 1), sigma(t), VP)
    assert ours.dtype == torch.float32
    assert relative_error(ours.double(), paper_increment(t, *step)) < 1e-4


@pytest.mark.parametrize("form", ["integrated", "per_step"])
def test_a_tracked_step_is_algorithm_2_with_temperature_and_offset_in_either_form(form):
    settings = WIDE.with_(prior=1e-6, temperature=0.2, offset=2e-4, offset_form=form)
    for t in TIMESTEPS:
        # so close together that the posterior stays away from the clamp at every t
        next_state, state, negative, reference = step = ddpm_step(t, apart=0.3 * sigma(t - 1))
        tracker = PosteriorTracker(settings, OFFSET, VP)
        tracker.anchor(state, sigma(t), negative, reference, tracker.log_posterior(state, sigma(t)), torch.ones(16))
        tau_part = 0.2 * paper_increment(t, *step)
        expected = math.log(1e-6) + tau_part + 2e-4 / (2 * CHAIN.posterior_variances[t - 1])
        assert relative_error(tracker.log_posterior(next_state, sigma(t - 1)), expected) < 1e-10


@pytest.mark.parametrize("noise_scale", [1.0, 8.0])
def test_all_frames_give_the_same_increment_for_the_same_states(noise_scale):
    flow = NoiseFrame("flow", noise_scale)
    for t in TIMESTEPS:
        next_vp, vp, negative, reference = step = ddpm_step(t)
        high, low = sigma(t), sigma(t - 1)
        ve, next_ve = vp * math.sqrt(1 + high**2), next_vp * math.sqrt(1 + low**2)
        level, next_level = high / (noise_scale + high), low / (noise_scale + low)
        truth = paper_increment(t, *step)
        in_ve = posterior_increment(next_ve, ve, negative, reference, low, high, VE)
        in_flow = posterior_increment(
            next_ve * (1 - next_level), ve * (1 - level), negative, reference, next_level, level, flow
        )
        assert relative_error(in_ve, truth) < 1e-9
        assert relative_error(in_flow, truth) < 1e-9


@pytest.mark.parametrize("noise_scale", [1.0, 8.0])
def test_a_flow_increment_at_t_1_is_finite_and_the_limit_of_those_below(noise_scale):
    flow = NoiseFrame("flow", noise_scale)
    generator = torch.Generator().manual_seed(0)
    state, next_state, negative, reference = torch.randn(4, 8, 3, 4, 4, generator=generator, dtype=torch.float64)
    at_1 = posterior_increment(next_state, state, negative, reference, 0.95, 1.0, flow)
    # At infinite noise the kernel is N(D, sigma'^2), whatever the state was.
    x, low = next_state / 0.05, noise_scale * 0.95 / 0.05
    far, near = ((x - d).flatten(1).square().sum(1) for d in (negative, reference))
    torch.testing.assert_close(at_1, -(far - near) / (2 * low**2), rtol=1e-9, atol=1e-12)
    below = [posterior_increment(next_state, state, negative, reference, 0.95, 1 - gap, flow) for gap in (1e-3, 1e-6)]
    errors = [float((b - at_1).abs().max()) for b in below]
    assert errors[1] < 1e-4 and errors[1] < errors[0] / 100


@pytest.mark.parametrize("shape", [(4, 6), (4, 2, 5), (4, 2, 5, 3), (4, 2, 5, 3, 2)], ids=str)
def test_any_latent_rank_gives_the_same_increment_as_its_flat_form(shape):
    step = ddpm_step(500, shape)
    flat = [x.flatten(1) for x in step]
    ours = posterior_increment(*step, sigma(499), sigma(500), VP)
    assert ours.shape == (4,)
    torch.testing.assert_close(ours, posterior_increment(*flat, sigma(499), sigma(500), VP), rtol=1e-12, atol=0)


def test_elements_of_weight_0_do_not_count():
    next_state, state, negative, reference = ddpm_step(500)
    weight = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    weight[..., :3] = 1
    inside = [x[..., :3] for x in (next_state, state, negative, reference)]
    nonsense = [torch.where(weight > 0, x, 1e3 * i) for i, x in enumerate((next_state, state, negative, reference))]
    torch.testing.assert_close(
        posterior_increment(*nonsense, sigma(499), sigma(500), VP, weight),
        posterior_increment(*inside, sigma(499), sigma(500), VP),
        rtol=1e-10,
        atol=0,
    )


def test_float16_states_are_accumulated_in_float32():
    # 65,536 elements of product 1 / 16: summed in float16 this would stall far below 4096.
    ones = torch.ones(1, 65536, dtype=torch.float16)
    increment = posterior_increment(ones / 16, ones * 0, ones, ones * 0, 0.5, 1.0)
    expected = 65536 * (1 / 16 - 0.75 / 2) / 0.25
    assert increment.dtype == torch.float32
    assert float(increment) == pytest.approx(expected, rel=1e-6)


def test_no_precision_is_lost_at_high_noise_in_float32():
    """At sigma 4518 and 65,000 elements, the difference of two norms loses 2e-3."""
    next_state, state, negative, reference = torch.randn(4, 4, 65000, generator=torch.Generator().manual_seed(0))
    negative = reference + 0.01 * negative
    state, next_state = 4518 * state, 4518 * state * (4000 / 4518) ** 2 + 1000 * next_state
    ours = posterior_increment(next_state, state, negative, reference, 4000.0, 4518.0)
    truth = posterior_increment(*(x.double() for x in (next_state, state, negative, reference)), 4000.0, 4518.0)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-9)


class Chain:
    """A scripted sampler: random states and predictions at each level, and the posterior by hand."""

    def __init__(self, shape: Sequence[int] = (3, 2, 4), seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.shape, self.dtype = tuple(shape), dtype

    def point(self) -> tuple[Tensor, Tensor, Tensor]:
        """A state, and the undesired and the reference prediction there."""
        state, negative, reference = torch.randn(3, *self.shape, generator=self.generator, dtype=self.dtype)
        return state, reference + 0.2 * negative, reference

    @staticmethod
    def jump(start: tuple[Tensor, Tensor, Tensor], state: Tensor, low: float, high: float) -> Tensor:
        """log of the ratio of two normal densities, written with the kernel's mean and variance."""
        kernel = ReverseKernel(high, low)
        densities = [
            torch.distributions.Normal(kernel.mean(start[0], d), kernel.variance**0.5)
            .log_prob(state)
            .flatten(1)
            .sum(1)
            for d in (start[1], start[2])
        ]
        return densities[0] - densities[1]


def visit(
    tracker: PosteriorTracker, point: tuple[Tensor, Tensor, Tensor], level: float, anchor: bool = True
) -> Tensor:
    state, negative, reference = point
    log_posterior = tracker.log_posterior(state, level)
    if anchor:
        tracker.anchor(state, level, negative, reference, log_posterior, torch.ones(len(state)))
    return log_posterior


def tracker_of(levels: Sequence[float] | None, settings: Settings = WIDE) -> PosteriorTracker:
    return PosteriorTracker(settings, OFFSET, VE, levels)


def test_the_chain_starts_at_the_prior_and_adds_every_jump():
    chain, tracker = Chain(), tracker_of([4.0, 2.0, 1.0])
    a, b, c = chain.point(), chain.point(), chain.point()
    assert visit(tracker, a, 4.0).exp().tolist() == pytest.approx([0.3] * 3)
    at_b = math.log(0.3) + chain.jump(a, b[0], 2.0, 4.0)
    torch.testing.assert_close(visit(tracker, b, 2.0), at_b, rtol=1e-10, atol=0)
    torch.testing.assert_close(visit(tracker, c, 1.0), at_b + chain.jump(b, c[0], 1.0, 2.0), rtol=1e-10, atol=0)


def test_a_corrected_point_replaces_its_trial():
    """Heun: a trial at the next level, then the corrected state there; the chain goes on from the corrected one."""
    chain, tracker = Chain(), tracker_of([4.0, 2.0, 1.0])
    a, trial, corrected, c = (chain.point() for _ in range(4))
    visit(tracker, a, 4.0)
    visit(tracker, trial, 2.0)
    at_corrected = math.log(0.3) + chain.jump(a, corrected[0], 2.0, 4.0)
    torch.testing.assert_close(visit(tracker, corrected, 2.0), at_corrected, rtol=1e-10, atol=0)
    assert [anchor.level for anchor in tracker.anchors] == [4.0, 2.0]
    expected = at_corrected + chain.jump(corrected, c[0], 1.0, 2.0)
    torch.testing.assert_close(visit(tracker, c, 1.0), expected, rtol=1e-10, atol=0)


def test_a_trial_point_without_noise_keeps_the_posterior_of_its_step():
    """dpm_2_ancestral: at every level a trial first, then the step itself, whose evidence counts."""
    chain = Chain()
    tracker = PosteriorTracker(WIDE, OFFSET, VE, [4.0, 2.0, 1.0], trial_points=True)
    a, trial, b, other_trial = (chain.point() for _ in range(4))
    at_a = guided_visit(tracker, a, 4.0)
    assert torch.equal(guided_visit(tracker, trial, 2.0 * (1 + 3e-6)), at_a)
    at_b = guided_visit(tracker, b, 2.0)
    torch.testing.assert_close(at_b, at_a + chain.jump(a, b[0], 2.0, 4.0), rtol=1e-10, atol=0)
    assert torch.equal(guided_visit(tracker, other_trial, 1.0), at_b)
    assert not torch.equal(tracker.log_posterior(chain.point()[0], 0.5), at_b)  # the run ends here, no trial


def guided_visit(tracker: PosteriorTracker, point: tuple[Tensor, Tensor, Tensor], level: float) -> Tensor:
    """A call that knows the predictions at its own state, as all of a sampler's are."""
    state, negative, reference = point
    log_posterior = tracker.log_posterior(state, level, (negative, reference))
    tracker.anchor(state, level, negative, reference, log_posterior, torch.ones(len(state)))
    return log_posterior


@pytest.mark.parametrize("rounding", [1 + 3e-6, 1 - 3e-6])
def test_a_trial_a_few_units_of_rounding_off_its_level_is_replaced_too(rounding):
    """dpmpp_2s_ancestral reaches the next level's sigma as its midpoint, by another formula."""
    chain, tracker = Chain(), tracker_of([4.0, 2.0, 1.0])
    a, trial, b = (chain.point() for _ in range(3))
    visit(tracker, a, 4.0)
    visit(tracker, trial, 2.0 * rounding)
    at_b = visit(tracker, b, 2.0)
    torch.testing.assert_close(at_b, math.log(0.3) + chain.jump(a, b[0], 2.0, 4.0), rtol=1e-10, atol=0)
    assert [anchor.level for anchor in tracker.anchors] == [4.0, 2.0]


def test_midpoints_get_a_posterior_but_never_become_anchors():
    chain, tracker = Chain(), tracker_of([4.0, 2.0])
    a, middle, b = (chain.point() for _ in range(3))
    visit(tracker, a, 4.0)
    at_middle = visit(tracker, middle, 3.0)
    torch.testing.assert_close(at_middle, math.log(0.3) + chain.jump(a, middle[0], 3.0, 4.0), rtol=1e-10, atol=0)
    at_b = visit(tracker, b, 2.0)
    torch.testing.assert_close(at_b, math.log(0.3) + chain.jump(a, b[0], 2.0, 4.0), rtol=1e-10, atol=0)
    assert [anchor.level for anchor in tracker.anchors] == [4.0, 2.0]


def test_levels_match_the_schedule_through_float32_rounding_but_not_a_neighbour():
    chain, tracker = Chain(), tracker_of([157.407, 14.6, 0.1])
    for level in (157.407, 14.6 * (1 + 3e-7), 0.1 * (1 + 1e-3)):
        visit(tracker, chain.point(), level)
    assert [anchor.level for anchor in tracker.anchors] == [157.407, 14.6 * (1 + 3e-7)]


def test_the_first_call_is_an_anchor_even_off_the_schedule():
    chain, tracker = Chain(), tracker_of([4.0, 2.0])
    a, b = chain.point(), chain.point()
    visit(tracker, a, 3.9)
    expected = math.log(0.3) + chain.jump(a, b[0], 2.0, 3.9)
    torch.testing.assert_close(visit(tracker, b, 2.0), expected, rtol=1e-10, atol=0)


def test_adaptive_samplers_anchor_every_call_and_forget_a_rejected_step():
    chain, tracker = Chain(), tracker_of(None)
    a, too_far, b, c = (chain.point() for _ in range(4))
    visit(tracker, a, 4.0)
    visit(tracker, too_far, 0.7)
    at_b = math.log(0.3) + chain.jump(a, b[0], 2.3, 4.0)
    torch.testing.assert_close(visit(tracker, b, 2.3), at_b, rtol=1e-10, atol=0)
    torch.testing.assert_close(visit(tracker, c, 0.6), at_b + chain.jump(b, c[0], 0.6, 2.3), rtol=1e-10, atol=0)
    assert [anchor.level for anchor in tracker.anchors] == [4.0, 2.3, 0.6]


def test_a_step_without_an_anchor_is_jumped_over():
    """No negative prediction at 2.0: the next posterior comes from one kernel over both steps."""
    chain, tracker = Chain(), tracker_of([4.0, 2.0, 1.0])
    a, skipped, c = (chain.point() for _ in range(3))
    visit(tracker, a, 4.0)
    visit(tracker, skipped, 2.0, anchor=False)
    expected = math.log(0.3) + chain.jump(a, c[0], 1.0, 4.0)
    torch.testing.assert_close(visit(tracker, c, 1.0), expected, rtol=1e-10, atol=0)


def test_calling_again_at_the_first_point_keeps_its_posterior_and_more_noise_starts_afresh():
    chain = Chain()
    for level, start in ((4.0, 0.7), (9.0, 0.3)):
        tracker = tracker_of([4.0, 2.0, 1.0])
        a, b = chain.point(), chain.point()
        tracker.anchor(a[0], 4.0, a[1], a[2], torch.full((3,), math.log(0.7)), torch.ones(3))
        visit(tracker, b, 2.0)
        assert visit(tracker, a, level).exp().tolist() == pytest.approx([start] * 3)
        assert [anchor.level for anchor in tracker.anchors] == [level]


def test_rising_noise_goes_back_to_the_last_anchor_above_it():
    chain, tracker = Chain(), tracker_of([4.0, 2.0, 1.0])
    a, b, c, again = (chain.point() for _ in range(4))
    for point, level in ((a, 4.0), (b, 2.0), (c, 1.0)):
        visit(tracker, point, level)
    expected = math.log(0.3) + chain.jump(a, again[0], 2.0, 4.0)
    torch.testing.assert_close(visit(tracker, again, 2.0), expected, rtol=1e-10, atol=0)


def test_a_call_at_zero_noise_keeps_the_posterior_of_the_step_before():
    chain = Chain()
    for form in ("integrated", "per_step"):
        tracker = tracker_of([4.0, 2.0], WIDE.with_(offset=1e-3, offset_form=form))
        visit(tracker, chain.point(), 4.0)
        before = visit(tracker, chain.point(), 2.0)
        torch.testing.assert_close(visit(tracker, chain.point(), 0.0), before)


def test_a_thousand_anchors_keep_few_states():
    chain, levels = Chain(), [float(1000 - i) for i in range(1000)]
    tracker = tracker_of(levels)
    for level in levels:
        visit(tracker, chain.point(), level)
    assert len(tracker.anchors) == 1000
    held = [a for a in tracker.anchors if a.state is not None or a.negative is not None or a.reference is not None]
    assert held == tracker.anchors[-MAX_ANCHOR_STATES:]
    assert all(anchor.log_posterior.shape == (3,) for anchor in tracker.anchors)


def test_posteriors_are_clamped_and_recover():
    settings = WIDE.with_(p_min=0.01, p_max=0.6)
    tracker = tracker_of([4.0, 2.0, 1.0], settings)
    state = torch.zeros(2, 1)
    tracker.anchor(state, 4.0, torch.ones(2, 1), torch.zeros(2, 1), tracker.log_posterior(state, 4.0), torch.ones(2))
    far = torch.tensor([[1000.0], [-1000.0]])  # towards the undesired mean, and away from it
    assert tracker.log_posterior(far, 2.0).exp().tolist() == pytest.approx([0.6, 0.01])
    tracker.anchor(far, 2.0, torch.ones(2, 1), torch.zeros(2, 1), tracker.log_posterior(far, 2.0), torch.ones(2))
    assert tracker.log_posterior(-far, 1.0).exp().tolist() == pytest.approx([0.01, 0.6])


def test_the_tracked_offset_is_added_at_every_jump():
    settings = WIDE.with_(prior=1e-6, offset=5.0, offset_form="total")
    chain, tracker = Chain(), tracker_of([4.0, 2.0, 1.0], settings)
    state, _, reference = chain.point()
    total = math.log(1e-6)
    for high, low in itertools.pairwise((4.0, 2.0, 1.0)):
        visit(tracker, (state, reference, reference), high)
        total += offset_increment(settings, ReverseKernel(high, low), OFFSET)
        assert tracker.log_posterior(state, low).tolist() == pytest.approx([total] * 3)


def test_images_of_a_batch_do_not_touch_one_another():
    chain = Chain(seed=5)
    points = [chain.point() for _ in range(4)]
    levels = [4.0, 2.0, 1.0, 0.5]
    together = tracker_of(levels)
    batch = [visit(together, point, level) for point, level in zip(points, levels, strict=True)]
    for i in range(3):
        alone = tracker_of(levels)
        for point, level, expected in zip(points, levels, batch, strict=True):
            state, negative, reference = (x[i : i + 1] for x in point)
            ours = visit(alone, (state, negative, reference), level)
            torch.testing.assert_close(ours, expected[i : i + 1], rtol=1e-12, atol=0)


def test_start_values_can_be_given_per_image():
    start = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64).log()
    tracker = PosteriorTracker(WIDE, OFFSET, VE, [4.0], log_prior=start)
    assert torch.equal(tracker.log_posterior(Chain().point()[0], 4.0), start)


def test_tracking_is_deterministic():
    runs = []
    for _ in range(2):
        chain = Chain(dtype=torch.float32, seed=3)
        guidance = NegativeGuidance([Settings()], levels=[4.0, 2.0, 1.0])
        for level in (4.0, 2.0, 1.0):
            state, negative, reference = chain.point()
            guidance(state, level, reference, reference, [negative])
        runs.append(guidance.trace())
    assert torch.equal(runs[0].posterior, runs[1].posterior)
    assert torch.equal(runs[0].scale, runs[1].scale)
