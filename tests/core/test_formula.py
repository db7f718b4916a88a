"""Algorithm 2's increment against the paper's formula, in every frame and precision."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dng_core.evidence import Call, held_evidence
from dng_core.frames import VE, VP, NoiseFrame
from dng_core.posterior import (
    Chain,
    Path,
    step,
)
from dng_core.schedules import DDPMSchedule

from .walks import WIDE

CHAIN = DDPMSchedule.named("linear")
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
