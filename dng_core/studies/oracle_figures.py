"""Figures 1 to 3: the increment against the paper's formula, and the oracle's posterior and removal.

Each function yields rows for a table; the claims they show are in docs/figures.md.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..evidence import Call, held_evidence
from ..frames import VP
from ..guidance import NegativeGuidance
from ..oracle import GaussianMixture
from ..posterior import Chain
from ..sampling import ddpm_sample
from ..schedules import DDPMSchedule, ddpm_sigmas, karras_sigmas
from ..settings import PRESETS, Settings
from .metrics import balance_kl_renormalised, class_histogram

COMPONENTS = 8  # of the mixture; like the numbers below, a choice
DIMENSIONS = 32
STD = 0.2
STEP_COUNTS = (20, 30, 50, 100, 250, 1000)
NO_CLAMP = Settings(prior=1 / COMPONENTS, p_min=1e-30, p_max=1 - 1e-6, max_scale=1e6)


def paper_increment(
    chain: DDPMSchedule, t: int, x_next: Tensor, x: Tensor, eps_negative: Tensor, eps: Tensor
) -> Tensor:
    """The increment (batch,) of Algorithm 2 as the paper writes it, for DDPM states and noise; tau is 1, delta 0.

    Each noise prediction gives a mean mu = (x_t - beta_t / sqrt(1 - abar_t) eps) / sqrt(alpha_t) (Ho et al. 2020,
    eq. 11). The increment is the difference of the squared distances from x_{t-1} to the two, over -2 beta-tilde_t.
    """
    beta, alpha_bar = chain.betas[t], chain.alpha_bars[t]

    def squared_distance(noise: Tensor) -> Tensor:
        mean = (x - beta / (1 - alpha_bar).sqrt() * noise) / (1 - beta).sqrt()
        return (x_next - mean).flatten(1).square().sum(dim=1)

    variance = chain.posterior_variances[t - 1]
    return -(squared_distance(eps_negative) - squared_distance(eps)) / (2 * variance)


def increment_figure(seed: int) -> Iterator[dict[str, Any]]:
    """Figure 1: the largest relative error of the increment over all DDPM steps, in float64 and float32.

    At each step the norm of 16 random states' errors is divided by the norm of their increments in float64, because
    a single state's increment can be near zero by chance.
    """
    chain = DDPMSchedule.named("linear")
    generator = torch.Generator().manual_seed(seed)
    worst = {torch.float64: 0.0, torch.float32: 0.0}
    for t in range(1, 1000):
        x, x_next, eps, eps_negative = torch.randn(4, 16, 3, 8, 8, generator=generator, dtype=torch.float64)
        truth = paper_increment(chain, t, x_next, x, eps_negative, eps)
        sigma, next_sigma = chain.sigmas[t].item(), chain.sigmas[t - 1].item()
        scale = (1 + sigma**2) ** 0.5
        negative, reference = scale * x - sigma * eps_negative, scale * x - sigma * eps
        for dtype in worst:
            state, following, d_negative, d_reference = (v.to(dtype) for v in (x, x_next, negative, reference))
            start = Call(VP.to_ve(state, sigma), sigma, d_reference, d_negative)
            ours = held_evidence(start, Call(VP.to_ve(following, next_sigma), next_sigma), start)
            worst[dtype] = max(worst[dtype], ((ours.double() - truth).norm() / truth.norm()).item())
    for dtype, error in worst.items():
        yield {"precision": str(dtype).removeprefix("torch."), "steps": 999, "largest relative error": error}


def posterior_figure(samples: int, seed: int) -> Iterator[dict[str, Any]]:
    """Figure 2: the tracked posterior against the exact one at the end of unguided ancestral chains."""
    mixture = GaussianMixture.random(COMPONENTS, (DIMENSIONS,), STD)
    settings = NO_CLAMP.with_(guidance_scale=0.0)
    for steps in STEP_COUNTS:
        _, error = _sample(mixture, settings, ddpm_sigmas(DDPMSchedule.named("linear"), steps), samples, seed)
        yield {"steps": steps, "samples": samples, "mean absolute error": error}


def removal_figure(samples: int, seed: int) -> Iterator[dict[str, Any]]:
    """Figure 3: what is left of the forbidden component under the paper's CIFAR-10 settings, over step counts."""
    mixture = GaussianMixture.random(COMPONENTS, (DIMENSIONS,), STD)
    chain = DDPMSchedule.named("linear")
    cifar = PRESETS["CIFAR-10"]
    for steps in STEP_COUNTS:
        schedules = {
            "DDPM": ddpm_sigmas(chain, steps),
            "Karras": karras_sigmas(steps, chain.sigmas[0].item(), chain.sigmas[-1].item()),
        }
        for name, sigmas in schedules.items():
            row: dict[str, Any] = {"steps": steps, "schedule": name, "samples": samples}
            for label, settings in {
                "unguided": cifar.with_(guidance_scale=0.0),
                "integrated offset": cifar,
                "per-step offset": cifar.with_(offset_form="per_step"),
            }.items():
                drawn, _ = _sample(mixture, settings, sigmas, samples, seed)
                histogram = class_histogram(mixture.classify(drawn), COMPONENTS)
                row[label] = histogram[0] / samples
                if label == "integrated offset":
                    row["KL of the rest"] = balance_kl_renormalised(histogram, 0)
            yield row


def _sample(
    mixture: GaussianMixture, settings: Settings, sigmas: list[float], samples: int, seed: int
) -> tuple[Tensor, float]:
    """Samples avoiding component 0, and the mean error of the posterior tracked at the last noise level.

    Under the exact settings (``NO_CLAMP``), the first state's exact posterior replaces the prior, as figure 2 needs.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, *mixture.means.shape[1:], generator=generator)
    start = noise * (1 + sigmas[0] ** 2) ** 0.5
    exact = settings.with_(guidance_scale=1.0) == NO_CLAMP.with_(guidance_scale=1.0)
    priors = [mixture.log_posterior(start, sigmas[0], [0])] if exact else None
    guidance = NegativeGuidance([settings], Chain(sigmas), priors)
    last: list[Tensor] = []

    def predict(x: Tensor, sigma: float) -> tuple[Tensor, list[Tensor]]:
        last[:] = [x]
        return mixture.denoised(x, sigma), [mixture.denoised(x, sigma, [0])]

    drawn = ddpm_sample(predict, noise, sigmas, guidance, generator)
    tracked = guidance.trace().posterior[-1, 0]
    error = (tracked - mixture.log_posterior(last[0], sigmas[-1], [0]).exp()).abs().mean().item()
    return drawn, error
