"""Evidence: what a jump from one noise level to the next says for the undesired condition c-.

Evidence is measured in nats: it is the change of log p(c-|x) along the jump. Every formula here is a function of the
model's predictions at one or both ends of the jump. All states are in the VE frame, x = x_0 + sigma n, and r is
sigma'^2 / sigma^2 for a jump from sigma to sigma'.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import ReverseKernel, at_least_float32

PROBE_SIZE = 0.1
"""How far off a probe evaluates the model, in units of sigma. This is small enough that the gap found on the oracle is
the exact one on average (tests/core/test_evidence.py), and large enough for the rounding of half precision."""

PROBE_SPACING = 1.6
"""A probe's answer is held until sigma has fallen by this factor, since the covariance gap varies slowly with the
noise level. On the oracle 1.6 has the least error over a run, at half the probes of 1 (docs/samplers.md). Of 30 Karras
steps, 12 are probed on Stable Diffusion's range (0.03 to 14.6), and 17 from 0.002 to 80."""

DETERMINISTIC_FACTOR = 1 / (2 - 2 * math.log(2))
"""The factor of :func:`foretell` on a deterministic run, 1.63. For small steps from much noise to none, it makes the
rule exact where both conditions are Gaussians that differ in their means alone (tests/core/test_elbo.py)."""


@dataclass(frozen=True)
class Call:
    """What the model said at one point of a run.

    The tensors are kept, not copied: do not change them in place.

    Parameters
    ----------
    x: (batch, ...), the state.
    sigma: the noise level of ``x``.
    reference: (batch, ...), D_ref, the denoised prediction (estimate of x_0) that the undesired one is compared with;
        None where the run ends, without another evaluation.
    negative: (batch, ...), D_neg, the denoised prediction under the undesired condition; None where the condition
        does not apply at this noise level.
    gap: (batch,), the covariance gap (see :func:`path_evidence`) that the last probe showed; None without probes.
    held: (batch, ...), the difference at an earlier call, where the condition applies but ``negative`` was not
        evaluated.
    """

    x: Tensor
    sigma: float
    reference: Tensor | None = None
    negative: Tensor | None = None
    gap: Tensor | None = None
    held: Tensor | None = None

    @property
    def applies(self) -> bool:
        """Whether the undesired condition applies here."""
        return self.negative is not None or self.held is not None

    @cached_property
    def difference(self) -> Tensor:
        """Delta = D_neg - D_ref, (batch, ...), in at least float32; only where both are known, or it is held."""
        if self.held is not None:
            return self.held
        assert self.negative is not None and self.reference is not None
        return at_least_float32(self.negative) - at_least_float32(self.reference)

    @property
    def total(self) -> Tensor:
        """D_neg + D_ref, (batch, ...), in at least float32; only where both are known."""
        assert self.negative is not None and self.reference is not None
        return at_least_float32(self.negative) + at_least_float32(self.reference)


def held_evidence(start: Call, end: Call, held: Call, weight: Tensor | None = None) -> Tensor:
    """log p(x'|x, c-) - log p(x'|x) for predictions that stay as they are along the jump, (batch,).

    This is Algorithm 2's difference of squared distances, written as one inner product, so that no two large norms
    cancel:

        (1 / sigma'^2) < D_neg - D_ref , x' - r x - (1 - r) (D_neg + D_ref) / 2 >

    It equals -(||x' - mu_neg||^2 - ||x' - mu_ref||^2) / (2 s^2) with mu = r x + (1 - r) D and s^2 the kernel's
    variance, since (1 - r) / s^2 = 1 / sigma'^2.

    Parameters
    ----------
    start, end: the two ends of the jump; ``end`` has less noise, and more than none.
    held: the call whose predictions are used. Algorithm 2 takes those of ``start``.
    weight: broadcastable to the state; elements of weight 0 do not count (outside an inpainting mask).

    Returns
    -------
    (batch,), in float32 or in the states' own precision where that is higher.
    """
    kernel = ReverseKernel(start.sigma, end.sigma)
    product = held.difference * (moved(start, end) - (1 - kernel.ratio) / 2 * held.total)
    return weighted_sum(product, weight) / kernel.next_sigma**2


def jump_energy(start: Call, end: Call, weight: Tensor | None = None) -> Tensor:
    """(1 - r) ||D_neg - D_ref||^2 / sigma'^2, (batch,), in nats, for the predictions at the start of a jump.

    It is the variance of :func:`held_evidence` along the reference's own chain, and twice what this evidence loses
    there on average. So errors of the predictions, which are a part of the difference, lose half of it at most.
    """
    kernel, difference = ReverseKernel(start.sigma, end.sigma), start.difference
    if weight is None:
        squared = torch.linalg.vector_norm(difference.flatten(1), dim=1).square()  # one pass over the state
    else:
        squared = weighted_sum(difference.square(), weight)
    return squared * ((1 - kernel.ratio) / kernel.next_sigma**2)


class Foretold(NamedTuple):
    """What the predictions of a run up to the start of a jump foretold of the image, for the rule ``elbo``.

    ``gathered``: (batch, ...), the sum A of :func:`elbo_evidence`, with this jump's part. ``expected``: (batch, ...),
    D_ref at the start of the jump. ``energy``: (batch,), of the jump (:func:`jump_energy`).
    """

    gathered: Tensor
    expected: Tensor
    energy: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Foretold":
        """The same on another device, in its own precision or another."""
        return Foretold(*(values.to(device, dtype) for values in self))


def foretell(
    start: Call, end: Call, before: Foretold | None, factor: float = 1.0, weight: Tensor | None = None
) -> Foretold:
    """What is foretold by the end of a jump, where ``before`` was by the end of the last one.

    ``factor`` is 1 where the states are those of the exact chain. On a deterministic run they are nearer to the image
    than independent ones would be, which DETERMINISTIC_FACTOR makes up for.
    """
    assert start.reference is not None
    kernel = ReverseKernel(start.sigma, end.sigma)
    part, difference = factor * (1 - kernel.ratio) / kernel.next_sigma**2, start.difference
    gathered = part * difference if before is None else torch.add(before.gathered, difference, alpha=part)
    return Foretold(gathered, start.reference, jump_energy(start, end, weight))


def elbo_evidence(foretold: Foretold, end: Call, weight: Tensor | None = None) -> Tensor:
    """What a jump adds to log p(c-|x), (batch,), by how well the predictions foretold the image that is now expected.

    How well denoisers foretell an image x_0 from its noisy states says how likely the image is under each condition:
    the difference of two evidence lower bounds (Li et al. 2023, "Your diffusion model is secretly a zero-shot
    classifier"), which is exact on average over the noise (Kong et al. 2023, "Information-theoretic diffusion"). With
    s = 1 / sigma^2,

        log p(x_0|c-) - log p(x_0) = 1/2 E int ||x_0 - D_ref||^2 - ||x_0 - D_neg||^2 ds
                                   = E int < Delta, x_0 - D_ref > - ||Delta||^2 / 2 ds

    Along a run the latest D_ref stands for x_0, and the run's own states for the noisy ones. From one state to the
    next this changes by

        < A, D_ref(x') - D_ref(x) > - (s' - s) ||Delta(x)||^2 / 2

    with A the sum of factor (s' - s) Delta over the jumps so far (:func:`foretell`). The sampler's noise does not
    appear.

    Parameters
    ----------
    foretold: by the end of the jump.
    end: with its reference.
    """
    assert end.reference is not None
    change = at_least_float32(end.reference) - at_least_float32(foretold.expected)
    return weighted_sum(foretold.gathered * change, weight) - foretold.energy / 2


def path_evidence(start: Call, end: Call, gap: Tensor, weight: Tensor | None = None) -> Tensor:
    """What a jump adds to log p(c-|x), (batch,), whatever path or noise took the state there.

    log p is a function of the state and of the noise level alone. By Tweedie's formula and the heat equation, with
    Delta = D_neg - D_ref and D-bar their mean,

        d log p = < Delta, dx > / sigma^2 + (2 < Delta, D-bar - x > / sigma^3 + div Delta / sigma) d sigma

    :func:`held_evidence` integrates all but the divergence, for predictions that stay as they are. Its mean over the
    predictions of both ends is the trapezoidal rule. The divergence is div Delta = G / sigma^2 with

        G = tr Cov[x_0 | x, c-] - tr Cov[x_0 | x],

    since a denoiser's Jacobian is its posterior covariance over sigma^2. G is the covariance gap. It varies slowly,
    and adds -G (1 - r) / (2 sigma'^2). Where every step's noise is the exact kernel's, the divergence cancels the
    quadratic variation on average, and Algorithm 2 does without both.

    Parameters
    ----------
    gap: (batch,), the covariance gap G along the jump.
    """
    mean = (held_evidence(start, end, start, weight) + held_evidence(start, end, end, weight)) / 2
    return mean - divergence_evidence(start, end, gap)


def divergence_evidence(start: Call, end: Call, gap: Tensor) -> Tensor:
    """G (1 - r) / (2 sigma'^2), (batch,): what the divergence takes from log p along a jump."""
    kernel = ReverseKernel(start.sigma, end.sigma)
    return gap * (1 - kernel.ratio) / (2 * kernel.next_sigma**2)


def gap_of_step(start: Call, end: Call, guided: Tensor, noise_fraction: float, weight: Tensor | None = None) -> Tensor:
    """The covariance gap G of :func:`path_evidence`, (batch,), as the noise of one sampling step shows it.

    A sampler that moved towards the estimate ``guided`` (batch, ...) drew the noise n = x' - r x - (1 - r) ``guided``,
    of ``noise_fraction`` f (above 0) times the exact kernel's variance. (At f below 1, n also holds a part along
    x - ``guided``, which is neglected.) That noise is a probe of the divergence: on average

        < Delta(x') - Delta(x), n > = f (1 - r) G

    A single step's estimate is noisy. Its error grows with the number of elements and with the size of Delta.
    """
    kernel = ReverseKernel(start.sigma, end.sigma)
    noise = moved(start, end) - (1 - kernel.ratio) * guided
    return weighted_sum((end.difference - start.difference) * noise, weight) / (noise_fraction * (1 - kernel.ratio))


def moved(start: Call, end: Call) -> Tensor:
    """x' - r x, (batch, ...)."""
    return at_least_float32(end.x) - ReverseKernel(start.sigma, end.sigma).ratio * at_least_float32(start.x)


def weighted_sum(product: Tensor, weight: Tensor | None) -> Tensor:
    """The sum over the elements that count, (batch,)."""
    if weight is not None:
        product = product * weight
    return product.flatten(1).sum(dim=1)


@dataclass(frozen=True)
class Probe:
    """Where to evaluate the denoisers once more: at the VE state ``x`` (batch, ...), along ``direction``.

    The covariance gap is the trace of Delta's Jacobian, times sigma^2. Hutchinson's estimator (1990) takes a trace
    from one random direction v of independent signs: div Delta ~ < v, Delta(x + h v) - Delta(x) > / h.
    """

    x: Tensor
    direction: Tensor
    sigma: float

    def covariance_gap(self, difference: Tensor, probed_difference: Tensor) -> Tensor:
        """G, (batch,), from Delta at the run's state and Delta at the probe's, (batch, ...) each.

        G = sigma < v, Delta(x + h sigma v) - Delta(x) > / h with h = PROBE_SIZE.
        """
        change = at_least_float32(probed_difference) - at_least_float32(difference)
        return weighted_sum(change, self.direction) * (self.sigma / PROBE_SIZE)


class Prober:
    """Says where and when to probe along one run.

    Parameters
    ----------
    seed: of the directions, which come from a generator of their own: a sampler's random numbers stay as they are.
    weight: broadcastable to the state; elements of weight 0 are neither moved nor counted.
    """

    def __init__(self, seed: int, weight: Tensor | None = None) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._weight = weight
        self._last_sigma = 0.0

    def next(self, x: Tensor, sigma: float) -> Probe | None:
        """The probe to make at the VE state ``x``, which is then taken as made.

        None while the last gap still holds, and at no or infinite noise.
        """
        if math.isinf(sigma) or sigma == 0 or self._last_sigma / PROBE_SPACING < sigma <= self._last_sigma:
            return None
        self._last_sigma = sigma
        bits = torch.randint(0, 2, x.shape, generator=self._generator, dtype=torch.int8)
        direction = (2 * bits - 1).to(x.device, torch.promote_types(x.dtype, torch.float32))
        if self._weight is not None:
            direction = direction * self._weight
        return Probe((x + (PROBE_SIZE * sigma) * direction).to(x.dtype), direction, sigma)
