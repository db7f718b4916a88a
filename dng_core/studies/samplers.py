"""Samplers that ComfyUI's users choose, over whatever gives the denoised prediction."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..posterior import NoiseFraction

Sampler = Literal["euler_ancestral", "dpmpp_2m_sde", "dpmpp_2m", "euler"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
NOISY: tuple[Sampler, ...] = ("euler_ancestral", "dpmpp_2m_sde")  # those that add noise at each step
Denoiser = Callable[[Tensor, float], Tensor]
"""(VE states, sigma) -> the prediction that the sampler uses, with all guidance in it."""


def added_noise(sampler: Sampler) -> NoiseFraction:
    """The variance that a sampler adds over a step, as a share of the exact kernel's."""
    return lambda sigma, next_sigma: float(sampler in NOISY)


def sample(
    denoise: Denoiser, noise: Tensor, sigmas: Sequence[float], sampler: Sampler, generator: torch.Generator
) -> Tensor:
    """Latents, as :func:`~dng_core.sampling.ddpm_sample` gives them: the denoised prediction at the last level.

    With h = log(sigma / sigma') of a step and D the denoised prediction, the steps to x' are

    - euler: x' = e^-h x + (1 - e^-h) D;
    - euler_ancestral: the exact kernel, x' = e^-2h x + (1 - e^-2h) D + sigma' (1 - e^-2h)^(1/2) n;
    - dpmpp_2m, dpmpp_2m_sde: the same two with D extrapolated from the last two predictions (Lu et al. 2022,
      "DPM-Solver++", second order multistep).

    Parameters
    ----------
    noise: (n, ...), standard normal; the run starts from noise * sqrt(1 + sigma^2).
    sigmas: falling noise levels above 0.
    generator: draws the steps' noise on the CPU.
    """
    x = noise * (1 + sigmas[0] ** 2) ** 0.5
    before: tuple[Tensor, float] | None = None
    for i, sigma in enumerate(sigmas):
        prediction = denoise(x, sigma)
        if i + 1 == len(sigmas):
            return prediction
        h = math.log(sigma / sigmas[i + 1])
        towards = prediction
        if before is not None and sampler.startswith("dpmpp"):
            last, last_h = before
            towards = prediction + 0.5 * h / last_h * (prediction - last)
        before = prediction, h
        noisy = sampler in NOISY
        kept = math.exp(-2 * h if noisy else -h)
        x = kept * x + (1 - kept) * towards
        if noisy:
            step_noise = torch.randn(noise.shape, generator=generator).to(x.device)
            x = x + sigmas[i + 1] * (1 - kept) ** 0.5 * step_noise
    raise ValueError("there must be at least one noise level")
