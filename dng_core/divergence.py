"""The covariance gap, a term of the posterior that only noise supplies by itself, from one probe of the denoisers.

The divergence of Delta = D_neg - D_ref with respect to the VE state is G / sigma^2 with

    G = tr Cov[x_0 | x, c-] - tr Cov[x_0 | x],

since a denoiser's Jacobian is its posterior covariance over sigma^2. Hutchinson's estimator (1990) takes the trace
from one random direction v of independent signs: div Delta ~ < v, Delta(x + h v) - Delta(x) > / h.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import NoiseFrame, at_least_float32

PROBE_SIZE = 0.1
"""h in units of sigma: as accurate as a tiny step, and large enough for half precision."""

PROBE_SPACING = 1.6
"""G varies slowly with the noise level: it is probed again once sigma has fallen by this factor, and held between."""


@dataclass(frozen=True)
class Probe:
    """Where to evaluate the denoisers once more: a state (batch, ...) in its run's frame, ``direction`` away."""

    state: Tensor
    direction: Tensor
    sigma: float

    def covariance_gap(self, difference: Tensor, probed_difference: Tensor) -> Tensor:
        """(batch,): sigma < v, Delta(x + h sigma v) - Delta(x) > / h, from Delta at the state and at the probe's."""
        change = at_least_float32(probed_difference) - at_least_float32(difference)
        return (self.direction * change).flatten(1).sum(dim=1) * (self.sigma / PROBE_SIZE)


class Prober:
    """Says where and when to probe along one run.

    Parameters
    ----------
    frame: the frame of the states.
    seed: of the directions, which come from a generator of their own: a sampler's random numbers stay as they are.
    weight: broadcastable to the state; elements of weight 0 are neither moved nor counted.
    """

    def __init__(self, frame: NoiseFrame, seed: int, weight: Tensor | None = None) -> None:
        self._frame = frame
        self._generator = torch.Generator().manual_seed(seed)
        self._weight = weight
        self._last_sigma = 0.0

    def next(self, state: Tensor, level: float) -> Probe | None:
        """The probe to evaluate at this state, or None where the last gap still holds (or noise is infinite)."""
        sigma = self._frame.sigma(level)
        if math.isinf(sigma) or sigma == 0 or self._last_sigma / PROBE_SPACING < sigma <= self._last_sigma:
            return None
        self._last_sigma = sigma
        bits = torch.randint(0, 2, state.shape, generator=self._generator, dtype=torch.int8)
        direction = (2 * bits - 1).to(state.device, torch.promote_types(state.dtype, torch.float32))
        if self._weight is not None:
            direction = direction * self._weight
        moved = state + (PROBE_SIZE * sigma / self._frame.scale(level)) * direction
        return Probe(moved.to(state.dtype), direction, sigma)
