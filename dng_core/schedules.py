"""Noise schedules: DDPM training chains, sampling sigmas, and the offset integrated over a chain.

``sigma`` is the noise level of the variance-exploding frame, x = x_0 + sigma n, so that a DDPM state is
x_vp = x / sqrt(1 + sigma^2) and sigma = sqrt((1 - alpha_bar) / alpha_bar).
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

ChainName = Literal["linear", "scaled_linear"]


@dataclass(frozen=True)
class DDPMSchedule:
    """A DDPM training chain (Ho et al. 2020, eq. 2 and 4), held in float64.

    Parameters
    ----------
    betas: (T,) variances of the forward steps, each in (0, 1).
    """

    betas: Tensor

    def __post_init__(self) -> None:
        if self.betas.ndim != 1 or self.betas.numel() < 2:
            raise ValueError(f"betas must be a vector of at least two values, not of shape {tuple(self.betas.shape)}")
        if not bool(((self.betas > 0) & (self.betas < 1)).all()):
            raise ValueError("every beta must lie between 0 and 1, exclusive")
        object.__setattr__(self, "betas", self.betas.to(torch.float64))

    @classmethod
    def named(cls, name: ChainName, steps: int = 1000) -> "DDPMSchedule":
        """A public chain: "linear" is DDPM's (1e-4 .. 0.02), "scaled_linear" Stable Diffusion's (0.00085 .. 0.012)."""
        if name == "linear":
            return cls(torch.linspace(1e-4, 0.02, steps, dtype=torch.float64))
        if name == "scaled_linear":
            return cls(torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2)
        raise ValueError(f"unknown training chain {name!r}: choose 'linear' or 'scaled_linear'")

    @cached_property
    def alpha_bars(self) -> Tensor:
        """(T,) products of 1 - beta."""
        return torch.cumprod(1 - self.betas, dim=0)

    @cached_property
    def sigmas(self) -> Tensor:
        """(T,) noise levels of the training timesteps, rising."""
        return ((1 - self.alpha_bars) / self.alpha_bars).sqrt()

    @cached_property
    def posterior_variances(self) -> Tensor:
        """(T - 1,) beta-tilde of the steps t -> t - 1 for t = 1 .. T - 1 (Ho et al., eq. 7), in the VP frame."""
        return (1 - self.alpha_bars[:-1]) / (1 - self.alpha_bars[1:]) * self.betas[1:]

    def timestep(self, sigma: Tensor) -> Tensor:
        """The training timestep nearest to ``sigma`` in log sigma, as a long tensor of sigma's shape."""
        log_sigmas = self.sigmas.log().to(sigma.device)
        return (sigma.to(torch.float64).log()[..., None] - log_sigmas).abs().argmin(dim=-1)


@dataclass(frozen=True)
class IntegratedOffset:
    """F(sigma) = sum over training steps t with sigma_t <= sigma of 1 / (2 beta-tilde_t), by log-sigma interpolation.

    The paper's offset delta enters each reverse step as delta / (2 beta-tilde_t) (Algorithm 2). A jump over many
    training steps collects all of theirs: delta (F(sigma) - F(sigma')). At DDPM's own steps that is the paper's form,
    and it is the same at any step count and on any sampling schedule.

    Parameters
    ----------
    chain: the model's training chain. F is 0 at and below its lowest noise level, constant above its highest.
    """

    chain: DDPMSchedule

    @cached_property
    def _nodes(self) -> tuple[list[float], list[float]]:
        rates = 1 / (2 * self.chain.posterior_variances)
        values = torch.cat([rates.new_zeros(1), rates.cumsum(dim=0)])
        return self.chain.sigmas.log().tolist(), values.tolist()

    @property
    def total(self) -> float:
        """F at the top of the chain: the nats that an offset of 1 adds over a whole run."""
        return self._nodes[1][-1]

    def __call__(self, sigma: float) -> float:
        """F(sigma), for a VE noise level (0 and infinity included)."""
        return interpolated(*self._nodes, sigma)


def interpolated(log_sigmas: Sequence[float], values: Sequence[float], sigma: float) -> float:
    """The value at a noise level (0 and infinity included): linear in log sigma, constant outside of the points.

    Parameters
    ----------
    log_sigmas: rising, at least one.
    values: one for each.
    """
    log_sigma = math.log(sigma) if sigma > 0 else -math.inf
    if log_sigma <= log_sigmas[0]:
        return values[0]
    if log_sigma >= log_sigmas[-1]:
        return values[-1]
    i = bisect.bisect_right(log_sigmas, log_sigma)
    share = (log_sigma - log_sigmas[i - 1]) / (log_sigmas[i] - log_sigmas[i - 1])
    return values[i - 1] + share * (values[i] - values[i - 1])


def ddpm_sigmas(chain: DDPMSchedule, steps: int) -> list[float]:
    """``steps`` noise levels, falling, evenly spaced in the training timesteps T - 1 .. 0."""
    _check_steps(steps, len(chain.betas))
    timesteps = torch.linspace(len(chain.betas) - 1, 0, steps, dtype=torch.float64).round().long()
    return chain.sigmas[timesteps].tolist()


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> list[float]:
    """``steps`` noise levels, falling, by eq. 5 of Karras et al. (2022)."""
    _check_steps(steps)
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(top + i / max(steps - 1, 1) * (bottom - top)) ** rho for i in range(steps)]


def _check_steps(steps: int, most: float = math.inf) -> None:
    if not 1 <= steps <= most:
        raise ValueError(f"steps must be at least 1 and at most {most}, not {steps}")
