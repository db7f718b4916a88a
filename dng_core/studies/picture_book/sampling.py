"""Draws pictures by the samplers that ComfyUI's users choose, from whatever gives the denoised prediction."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ...models.picture_book.networks import PictureBook, unfold
from ...models.picture_book.prompting import denoised
from ...schedules import DDPMSchedule

Sampler = Literal["euler_ancestral", "dpmpp_2m_sde", "dpmpp_2m", "euler"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
LATENT = (48, 16, 16)
Denoiser = Callable[[Tensor, float], Tensor]
"""(VE states, sigma) -> the prediction that the sampler uses, with all guidance in it."""


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
        noisy = sampler in ("euler_ancestral", "dpmpp_2m_sde")
        kept = math.exp(-2 * h if noisy else -h)
        x = kept * x + (1 - kept) * towards
        if noisy:
            step_noise = torch.randn(noise.shape, generator=generator).to(x.device)
            x = x + sigmas[i + 1] * (1 - kept) ** 0.5 * step_noise
    raise ValueError("there must be at least one noise level")


def prompted(book: PictureBook, chain: DDPMSchedule, text: Tensor, empty: Tensor, cfg: float) -> Denoiser:
    """Classifier-free guidance alone, D_u + cfg (D_p - D_u); ``text`` and ``empty`` as ``denoised`` takes them."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        if cfg == 1:
            return denoised(book, chain, x, sigma, [text])[0]
        positive, unconditional = denoised(book, chain, x, sigma, [text, empty])
        return unconditional + cfg * (positive - unconditional)

    return denoise


def pictures_of(latents: Tensor) -> Tensor:
    """Pictures in -1 .. 1, (n, 3, 64, 64), of latents."""
    return unfold(latents).clamp(-1, 1)
