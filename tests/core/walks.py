"""Runs that the tests of the posterior step through: scripted states and predictions, without a model."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dng_core.evidence import Call
from dng_core.kernels import ReverseKernel
from dng_core.posterior import (
    Chain,
    Path,
    step,
)
from dng_core.schedules import DDPMSchedule, IntegratedOffset
from dng_core.settings import Settings

OFFSET = IntegratedOffset(DDPMSchedule.named("linear"))
WIDE = Settings(prior=0.3, p_min=1e-300, p_max=1 - 1e-12)  # no clamp to speak of

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
