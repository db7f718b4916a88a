"""Reverse kernels and noise frames against DDPM's formulas (Ho et al. 2020) written out in float64."""

import math

import pytest
import torch

from dng_core.frames import VE, VP, NoiseFrame
from dng_core.kernels import ReverseKernel, at_least_float32, per_image
from dng_core.schedules import ChainName, DDPMSchedule

CHAINS: tuple[ChainName, ...] = ("linear", "scaled_linear")


@pytest.mark.parametrize("name", CHAINS)
def test_mean_and_variance_are_ddpms_posterior_at_all_999_steps(name):
    chain = DDPMSchedule.named(name)
    generator = torch.Generator().manual_seed(0)
    bars, betas, sigmas = chain.alpha_bars.tolist(), chain.betas.tolist(), chain.sigmas.tolist()
    for t in range(1, 1000):
        x_vp, x_0 = torch.randn(2, 1, 5, generator=generator, dtype=torch.float64)
        # Ho et al., eq. 7; alpha_bar of t - 1 and t, both in the VP frame
        mean = bars[t - 1] ** 0.5 * betas[t] / (1 - bars[t]) * x_0
        mean = mean + (1 - betas[t]) ** 0.5 * (1 - bars[t - 1]) / (1 - bars[t]) * x_vp
        variance = (1 - bars[t - 1]) / (1 - bars[t]) * betas[t]

        kernel = ReverseKernel(sigmas[t], sigmas[t - 1])
        ours = kernel.mean(x_vp / bars[t] ** 0.5, x_0) * bars[t - 1] ** 0.5
        torch.testing.assert_close(ours, mean, rtol=1e-10, atol=1e-13)
        assert kernel.vp_variance == pytest.approx(variance, rel=1e-9)
        assert kernel.variance == pytest.approx(variance / bars[t - 1], rel=1e-9)


@pytest.mark.parametrize("name", CHAINS)
def test_forward_variance_is_beta_at_all_999_steps(name):
    chain = DDPMSchedule.named(name)
    bars, betas, sigmas = chain.alpha_bars.tolist(), chain.betas.tolist(), chain.sigmas.tolist()
    for t in range(1, 1000):
        kernel = ReverseKernel(sigmas[t], sigmas[t - 1])
        assert kernel.forward_variance * bars[t - 1] == pytest.approx(betas[t], rel=1e-9)


def test_two_jumps_spread_as_much_as_one_over_both_when_x0_is_known():
    # Chapman-Kolmogorov: the kernels to sigma' and on to sigma'' compose to the kernel to sigma''.
    first, second, both = ReverseKernel(3.0, 2.0), ReverseKernel(2.0, 0.5), ReverseKernel(3.0, 0.5)
    x, x_0 = torch.tensor([1.7], dtype=torch.float64), torch.tensor([-0.4], dtype=torch.float64)
    torch.testing.assert_close(second.mean(first.mean(x, x_0), x_0), both.mean(x, x_0), rtol=1e-12, atol=0)
    assert second.ratio**2 * first.variance + second.variance == pytest.approx(both.variance, rel=1e-12)


def test_a_jump_to_zero_noise_ends_at_the_denoised_prediction():
    kernel = ReverseKernel(2.0, 0.0)
    assert kernel.variance == 0
    assert torch.equal(kernel.mean(torch.tensor([3.0]), torch.tensor([0.25])), torch.tensor([0.25]))


def test_a_jump_from_infinite_noise_forgets_the_state():
    kernel = ReverseKernel(math.inf, 2.0)
    assert (kernel.ratio, kernel.variance) == (0.0, 4.0)


@pytest.mark.parametrize(("sigma", "next_sigma"), [(1.0, 1.0), (1.0, 2.0), (1.0, -0.5), (0.0, 0.0), (math.nan, 1.0)])
def test_a_kernel_that_does_not_go_down_in_noise_is_refused(sigma, next_sigma):
    with pytest.raises(ValueError, match="goes down in noise"):
        ReverseKernel(sigma, next_sigma)


@pytest.mark.parametrize("frame", [VE, VP, NoiseFrame("flow"), NoiseFrame("flow", 8.0)], ids=str)
def test_to_ve_takes_a_state_of_the_frame_to_x0_plus_sigma_noise_and_from_ve_takes_it_back(frame):
    x_0, noise = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for level in (0.001, 0.2, 0.9):
        state = {
            "ve": x_0 + level * noise,
            "vp": (x_0 + level * noise) / math.sqrt(1 + level**2),
            "flow": (1 - level) * x_0 + level * frame.noise_scale * noise,
        }[frame.kind]
        x = frame.to_ve(state, level)
        torch.testing.assert_close(x, x_0 + frame.sigma(level) * noise, rtol=1e-12, atol=0)
        torch.testing.assert_close(frame.from_ve(x, level), state, rtol=1e-12, atol=0)


@pytest.mark.parametrize("noise_scale", [1.0, 8.0])
def test_a_flow_at_t_1_is_infinite_noise_whose_state_carries_nothing(noise_scale):
    """A jump to t = 0.9 keeps r x of a state x: this is 0 at t = 1, and tends to 0 as t rises to 1."""
    frame, state = NoiseFrame("flow", noise_scale), torch.full((2,), 3.0, dtype=torch.float64)
    assert frame.sigma(1.0) == math.inf
    assert not frame.to_ve(state, 1.0).any()
    carried = [
        ReverseKernel(frame.sigma(level), frame.sigma(0.9)).ratio * frame.to_ve(state, level)
        for level in (1.0, 1 - 1e-12)
    ]
    assert torch.equal(carried[0], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(carried[1], carried[0], rtol=0, atol=1e-9)


def test_per_image_values_broadcast_over_any_rank():
    for shape in ((2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6)):
        scaled = per_image(torch.tensor([1.0, 2.0]), torch.ones(shape)) * torch.ones(shape)
        assert scaled.shape == shape
        assert scaled[0].unique().tolist() == [1.0] and scaled[1].unique().tolist() == [2.0]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision_is_raised_to_float32_and_never_lowered(given, wanted):
    assert at_least_float32(torch.zeros(1, dtype=given)).dtype == wanted
