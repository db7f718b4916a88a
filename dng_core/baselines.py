"""The methods that DNG is compared with: negative prompting and Safe Latent Diffusion.

Both push with a constant scale, whatever the image shows, and track no posterior.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .economy import Economy
from .guidance import Guidance, Negatives, Probed, combine
from .settings import check, check_numbers


@dataclass(frozen=True)
class NegativePrompting:
    """The settings of negative prompting: D = base - lambda_0 (D_neg - D_ref).

    Parameters
    ----------
    guidance_scale: lambda_0, at least 0; 0 switches guidance off.
    """

    method: ClassVar[str] = "negative_prompting"
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self, "guidance_scale", 0 <= self.guidance_scale < math.inf, "at least 0 and finite")


@dataclass(frozen=True)
class SafeLatentDiffusion:
    """The settings of Safe Latent Diffusion (Schramowski et al. 2023), by default as in the DNG authors' comparison.

    Parameters
    ----------
    guidance_scale: lambda, at least 0; 0 switches guidance off.
    threshold: elements of eps - eps(c-) that are not below it are not pushed.
    warmup_scale: s_s, at least 0: how fast the mask rises to 1 with the size of the difference.
    momentum_scale: s_m.
    momentum_decay: beta_m, at least 0 and less than 1.
    """

    method: ClassVar[str] = "safe_latent_diffusion"
    guidance_scale: float = 1.0
    threshold: float = 0.04
    warmup_scale: float = 100.0
    momentum_scale: float = 0.2
    momentum_decay: float = 0.1

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self, "guidance_scale", 0 <= self.guidance_scale < math.inf, "at least 0 and finite")
        check(self, "warmup_scale", 0 <= self.warmup_scale < math.inf, "at least 0 and finite")
        check(self, "momentum_scale", math.isfinite(self.momentum_scale), "finite")
        check(self, "momentum_decay", 0 <= self.momentum_decay < 1, "at least 0 and less than 1")


Baseline = NegativePrompting | SafeLatentDiffusion


def safe_latent_direction(
    difference: Tensor, sigma: float, momentum: Tensor, settings: SafeLatentDiffusion
) -> tuple[Tensor, Tensor]:
    """Safe Latent Diffusion's direction (Schramowski et al. 2023, eq. 4 to 8) and its new momentum.

    With d = eps - eps(c-) = (D_neg - D_ref) / sigma: mask = min(1, s_s |d|) where d < threshold, else 0;
    g = -mask d + s_m m; m <- beta_m m + (1 - beta_m) g. The noise prediction moves by -lambda g, so the denoised one
    by lambda sigma g, and the direction is -sigma g.

    Parameters
    ----------
    difference: D_neg - D_ref, (batch, ...).
    sigma: the VE noise level; at infinite noise and at none, the direction is zero.
    momentum: m, of the same shape.
    """
    if sigma == 0 or math.isinf(sigma):
        return torch.zeros_like(difference), momentum
    d = difference / sigma
    mask = (settings.warmup_scale * d.abs()).clamp(max=1) * (d < settings.threshold)
    g = -mask * d + settings.momentum_scale * momentum
    return -sigma * g, settings.momentum_decay * momentum + (1 - settings.momentum_decay) * g


class BaselineGuidance(Guidance):
    """Guides away from one or more undesired concepts by baselines, each with settings of its own.

    Between calls it keeps the momenta of Safe Latent Diffusion. It tracks no posterior, and so gives no trace, and
    no image sleeps: of ``economies`` only those count that look once in so many calls.
    """

    def __init__(self, settings: Sequence[Baseline], economies: Sequence[Economy] | None = None) -> None:
        super().__init__(len(settings), economies)
        self._settings = tuple(settings)
        self._momenta: list[Tensor | None] = [None] * len(settings)

    def guided(
        self,
        x: Tensor,
        sigma: float,
        base: Tensor,
        reference: Tensor,
        negatives: Negatives,
        held: Sequence[Tensor | None],
        probed: Probed | None,
    ) -> Tensor:
        directions, scales = [], []
        for i, (negative, difference) in enumerate(zip(negatives, held, strict=True)):
            if negative is not None:
                difference = negative - reference
            if difference is not None:
                directions.append(self._direction(i, difference, sigma))
                scales.append(difference.new_full((len(difference),), self._settings[i].guidance_scale))
        return combine(base, directions, scales)

    def _direction(self, i: int, difference: Tensor, sigma: float) -> Tensor:
        settings, momentum = self._settings[i], self._momenta[i]
        if isinstance(settings, NegativePrompting):
            return difference
        if momentum is None or momentum.shape != difference.shape:
            momentum = torch.zeros_like(difference)
        direction, self._momenta[i] = safe_latent_direction(difference, sigma, momentum, settings)
        return direction
