"""Algorithm 2 of Koulischer et al. (2025): the posterior p(c-|x), tracked along a sampling run, as one step.

:func:`step` is the algorithm. It takes the path so far and what the model says at the next point, and gives the path
that goes on from there and the posterior. It has no hidden state: asked twice, it answers twice the same.

The paper writes it for DDPM's steps:

    log p(c-|x_t) = log p(c-|x_t+1)
                    - 1 / (2 sigma_t^2) [tau (||x_t - mu(x_t+1, c-)||^2 - ||x_t - mu(x_t+1)||^2) - delta]

Here x_t+1 is x, the state where a jump starts, and x_t is x', the state where it ends. Likewise sigma and sigma'.

==============  =============================  =========================================================  ===========
The paper       here                           what it is                                                 unit
==============  =============================  =========================================================  ===========
x_t             ``Call.x``                     the state, in the VE frame: x_vp sqrt(1 + sigma^2)         data
t               ``Call.sigma``                 the noise level, sqrt((1 - alpha_bar_t) / alpha_bar_t)     data
eps(x_t)        (x - D_ref) / sigma            the noise prediction; D_ref is ``Call.reference``          1
eps(x_t, c-)    (x - D_neg) / sigma            under the undesired condition; D_neg is ``Call.negative``  1
mu(x_t)         ``kernel.mean(x, D_ref)``      the reverse mean, r x + (1 - r) D_ref                      data
mu(x_t, c-)     ``kernel.mean(x, D_neg)``      the reverse mean under the undesired condition             data
sigma_t^2       ``ReverseKernel.vp_variance``  beta-tilde, the variance of DDPM's reverse step            data^2
p(c-)           ``Settings.prior``             the share of samples expected to be undesired              1
log p(c-|x_t)   ``PathPoint.log_p``            the tracked posterior                                      nats
tau             ``Settings.temperature``       how far evidence counts                                    1
delta           ``Settings.offset``            a constant upward pull on the posterior                    offset_form
lambda_0        ``Settings.guidance_scale``    how hard the push is                                       1
lambda(x_t, t)  ``guidance.dynamic_scales``    the push at this state                                     1
p_min, p_max    ``Settings.p_min``, ``p_max``  bounds of the posterior                                    1
==============  =============================  =========================================================  ===========

Four rules say what evidence a jump brings. By default (*auto*) it is the paper's own, **algorithm_2**, where the
sampler adds noise, and **elbo** where it adds none. Algorithm 2 reads the evidence off that noise. Where there is
none, it misses a term, and on the trained networks that were measured its posterior is worse than the undesired's
share alone: on the MNIST network with 50 steps of ``euler`` the cross entropy of the digits' posteriors at sigma 1 is
0.60 and 0.65 on two seeds by ``algorithm_2``, 0.31 and 0.28 by ``elbo``, and 0.33 by the digits' shares alone
(docs/samplers.md, "Deterministic samplers").

The errors of both rules lower the posterior, and so leave a picture alone. Those of ``step_noise`` do not: on a small
text-to-image model (12,288 elements), told to avoid "night", it let the posterior of pictures by day rise from 0.00 to
0.97, and changed them as much as a negative prompt does; by ``algorithm_2`` the posterior stayed at 0.00
(docs/samplers.md, "Large steps"). On exact predictions with few elements ``step_noise`` and ``probe`` are nearest to
the truth at large steps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .evidence import (
    DETERMINISTIC_FACTOR,
    Call,
    Foretold,
    divergence_evidence,
    elbo_evidence,
    foretell,
    gap_of_step,
    held_evidence,
    jump_energy,
    path_evidence,
)
from .kernels import ReverseKernel
from .schedules import DDPMSchedule, IntegratedOffset, interpolated
from .settings import Rule, Settings

STATES_KEPT = 4
"""How many of the last points keep what the model said there. ComfyUI's samplers go back by at most one step (trial
points, rejected adaptive steps), so that a jump starts at one of the last two; 4 leaves room for other samplers."""

ON_SCHEDULE = 1e-5
"""How far, relatively, a call's sigma may be from the sampler's schedule by rounding: samplers compute sigma in
float32, some by way of its logarithm."""

SAME_SIGMA = 3 * ON_SCHEDULE
"""Two calls at one scheduled sigma differ by at most twice the above. Some samplers reach the next level by a formula
for their midpoint (``dpmpp_2s_ancestral``), for whose rounding the third part is left."""

LEAST_NOISE_FRACTION = 0.4
"""A step with less than this share of the exact kernel's noise counts as one without. The rule ``step_noise`` leaves
such a step to Algorithm 2, since the error of :func:`~.evidence.gap_of_step` grows as the noise shrinks. The value
separates ComfyUI's samplers at their default options: ``er_sde`` adds at most 0.34, the other stochastic ones at least
0.74 (but for three that on flow models follow no flow formula: UNSCALED in nodes/run/samplers.py)."""

GAP_MEMORY = 4.0
"""How fast the estimates of earlier steps fade in the rule ``step_noise``: as this power of sigma. With exact
predictions the power 2.5 removes more; the posteriors of the MNIST network are best at 4 (docs/samplers.md)."""

LONGEST_MEMORY = 0.8
"""The most that is left of earlier estimates after a step of the rule ``step_noise``, however short the step. This is
a memory of five steps, a choice: with a longer one the average over many small steps would lag behind."""

ERRORS = 0.5
"""The largest share of a jump's energy that is taken for errors. With the picture book's drift, measured on the places
of a scene, the cross entropy of 13 other posteriors of that model is 0.31 at 0.5, 0.36 at 1, and 4.6 without a bound
(0.46 by their shares alone); that of the MNIST network's digits is 0.19 at each (docs/samplers.md, "Drift")."""

NoiseFraction = Callable[[float, float], float]
"""(sigma, sigma') -> the variance that the sampler injects over that step, as a share of the exact kernel's."""


@dataclass(frozen=True)
class Chain:
    """The noise levels that a sampler goes down, and what is known of its steps: the same at every call of a run.

    Parameters
    ----------
    levels: the sigmas of the sampler's schedule; None for adaptive samplers, where a jump may start at any call.
    offset: the offset, integrated over the model's training chain.
    weight: broadcastable to the state, 0 where elements do not follow the chain (outside an inpainting mask).
    noise_fraction: gives the variance that the sampler adds over a step between scheduled levels, as a share of the
        exact kernel's; None if unknown, which the rule "auto" takes for noise. Give ``lambda *levels: 0.0`` for a
        deterministic sampler.
    trial_points: whether the sampler reaches each level first by a trial step without noise.
    """

    levels: Sequence[float] | None = None
    offset: IntegratedOffset = field(default_factory=lambda: IntegratedOffset(DDPMSchedule.named("linear")))
    weight: Tensor | None = None
    noise_fraction: NoiseFraction | None = None
    trial_points: bool = False

    def on_schedule(self, sigma: float) -> bool:
        """Whether a jump may start at ``sigma``."""
        return self.levels is None or any(math.isclose(sigma, known, rel_tol=ON_SCHEDULE) for known in self.levels)

    @cached_property
    def noisy(self) -> bool:
        """Whether the sampler adds noise enough for Algorithm 2, on average over its steps; True if unknown."""
        if self.noise_fraction is None:
            return True
        jumps = list(pairwise(self.levels)) if self.levels else [(2.0, 1.0)]  # an adaptive sampler adds some or none
        fractions = [self.noise_fraction(*jump) for jump in jumps if math.isfinite(jump[0])]
        return sum(fractions) >= LEAST_NOISE_FRACTION * max(len(fractions), 1)

    def rule(self, settings: Settings) -> Rule:
        """The rule by which evidence is counted along this chain."""
        if settings.rule != "auto":
            return settings.rule
        return "algorithm_2" if self.noisy else "elbo"

    def fraction(self, sigma: float, next_sigma: float) -> float | None:
        """The noise fraction of the jump; None where it is not known."""
        if self.noise_fraction is None or not self.on_schedule(next_sigma):
            return None
        return self.noise_fraction(sigma, next_sigma)


@dataclass(frozen=True)
class PathPoint:
    """A point of the tracked path, from which a jump may start.

    Parameters
    ----------
    sigma: its noise level.
    log_p: (batch,), log p(c-|x) there.
    evidence: (batch,), what the jump to this point said, at temperature 1 and without offset, in nats. The jump starts
        at the last point before this one that is not held.
    energy: (batch,), of that jump (:func:`~.evidence.jump_energy`). It is computed where something needs it: a drift,
        or a guidance scale of 0, by which a run is only observed (:func:`~.calibration.evidence_of`). Else it is None.
    applies: whether the undesired condition applies at this noise level.
    call: what the model said there; None where the point is held, and once it is older than the last few that are not.
    noise_gap: (batch,), the covariance gap as the noise of the steps up to here shows it (rule ``step_noise``).
    held: whether the undesired prediction was not evaluated here, though the condition applies.
    foretold: by the predictions before this point (rule ``elbo``); kept as long as ``call`` is.
    """

    sigma: float
    log_p: Tensor
    evidence: Tensor
    energy: Tensor | None
    applies: bool
    call: Call | None
    noise_gap: Tensor | None = None
    held: bool = False
    foretold: Foretold | None = None


@dataclass(frozen=True)
class Path:
    """The points of a run from which the next jump may start, falling in noise, for one undesired condition.

    Parameters
    ----------
    points: from the highest noise to the lowest.
    log_prior: (batch,), log p(c-|x) to begin with in place of the settings' prior, where a run goes on from another.
    foretold: by the predictions of that other run, where it ended without knowing what was then expected.
    guided: (batch, ...), the estimate that the sampler was last given, for the rule ``step_noise``.
        :func:`~.guidance.guide` sets it after every step; without it, ``step_noise`` is Algorithm 2.
    """

    points: tuple[PathPoint, ...] = ()
    log_prior: Tensor | None = None
    foretold: Foretold | None = None
    guided: Tensor | None = None

    def above(self, sigma: float) -> "Path":
        """The path without the points that do not lie above ``sigma`` in noise.

        So a corrected point takes the place of its trial point, and a rejected step is forgotten.
        """
        kept = [point for point in self.points if point.sigma > sigma * (1 + SAME_SIGMA)]
        return replace(self, points=tuple(kept))

    def at(self, sigma: float) -> PathPoint | None:
        """The point at ``sigma``, if there is one."""
        return next((p for p in self.points if math.isclose(p.sigma, sigma, rel_tol=SAME_SIGMA)), None)

    def add(self, point: PathPoint) -> "Path":
        """The path that goes on from ``point``; what the model said at the oldest points is forgotten."""
        known = [i for i, p in enumerate(self.points) if p.call]
        old = known[: max(0, len(known) + 1 - STATES_KEPT)]
        points = [replace(p, call=None, foretold=None) if i in old else p for i, p in enumerate(self.points)]
        return replace(self, points=(*points, point))


class Jump(NamedTuple):
    """The evidence of a jump, (batch,), and what the next one needs: see :class:`PathPoint`."""

    evidence: Tensor
    noise_gap: Tensor | None = None
    foretold: Foretold | None = None


def step(path: Path, call: Call, settings: Settings, chain: Chain) -> tuple[Path, Tensor]:
    """Algorithm 2 at one model call: the path that goes on from there, and log p(c-|x), (batch,).

        log p(c-|x') = log p(c-|x) + tau * evidence + offset + drift,  within [log p_min, log p_max]

    A call on the sampler's schedule becomes a point of the path. A midpoint gets a posterior, but no jump starts from
    it. The posterior stays as it is at sigma 0, at a trial point, and on a jump whose start has no undesired
    prediction. A level that was not called is jumped over: the reverse kernel has a closed form for a jump of any
    size, but the predictions at its start then count for a longer way. So it is with a call whose difference is held
    (:mod:`.economy`): it gets a posterior and becomes a point, but no jump starts from it.
    """
    above = path.above(call.sigma)
    last = above.points[-1] if above.points else None
    start = next((point for point in reversed(above.points) if not point.held), None)
    energy: Tensor | None = None
    if start is None or last is None:  # the first level called again keeps its posterior; a higher level starts afresh
        first = path.at(call.sigma)
        log_p = first.log_p if first else clamped(_log_prior(path, call, settings), settings)
        jump = Jump(torch.zeros_like(log_p), foretold=first.foretold if first else None)
        if first is None and path.foretold is not None and chain.rule(settings) == "elbo":
            jump = _counted_later(path.foretold, call, chain)
            log_p = advance(log_p, jump.evidence, settings.temperature, 0.0, settings)
    elif start.call is None or not start.applies or call.sigma == 0 or _is_trial(path, call, settings, chain):
        log_p = last.log_p
        jump = Jump(torch.zeros_like(log_p), start.noise_gap, start.foretold)
    else:
        guided = above.guided if last is start else None  # what the sampler was given along the whole jump
        jump = EVIDENCE[chain.rule(settings)](start, start.call, call, guided, chain)
        kernel = ReverseKernel(start.sigma, call.sigma)
        added: Tensor | float = offset_evidence(settings, kernel, chain.offset)
        if settings.drift or settings.guidance_scale == 0:
            energy = jump.foretold.energy if jump.foretold else jump_energy(start.call, call, chain.weight)
            added = added + drift_evidence(settings, kernel, energy)
        log_p = advance(start.log_p, jump.evidence, settings.temperature, added, settings)
    if start is not None and not chain.on_schedule(call.sigma):
        return above, log_p
    held, said = (False, call) if call.held is None else (True, None)
    point = PathPoint(
        call.sigma, log_p, jump.evidence, energy, call.applies, said, jump.noise_gap, held, jump.foretold
    )
    return above.add(point), log_p


def algorithm_2(start: PathPoint, said: Call, call: Call, guided: Tensor | None, chain: Chain) -> Jump:
    """The rule of Algorithm 2 as printed: the predictions before a jump count for all of it.

    Exact in the limit of small steps whose noise is the exact kernel's, as in DDPM's own sampler. On larger steps the
    posterior sinks a little on average, and on deterministic samplers it misses the divergence.
    """
    return Jump(held_evidence(said, call, said, chain.weight), start.noise_gap)


def step_noise(start: PathPoint, said: Call, call: Call, guided: Tensor | None, chain: Chain) -> Jump:
    """The rule that takes the predictions of both ends of a jump, and the divergence from the noise of the steps.

    Where that noise is not known, or too little, or a difference is held, Algorithm 2 stands in. The error of the
    divergence grows with the number of elements and with the difference of the two predictions: this rule is for small
    latents.
    """
    fraction = chain.fraction(said.sigma, call.sigma)
    noisy = fraction is not None and fraction >= LEAST_NOISE_FRACTION and not math.isinf(said.sigma)
    if fraction is None or not noisy or call.negative is None or guided is None:
        return algorithm_2(start, said, call, guided, chain)
    gap = gap_of_step(said, call, guided, fraction, chain.weight)
    if start.noise_gap is not None:
        memory = min((call.sigma / said.sigma) ** GAP_MEMORY, LONGEST_MEMORY)
        gap = torch.lerp(gap, start.noise_gap, memory)
    return Jump(path_evidence(said, call, gap, chain.weight), gap)


def probe(start: PathPoint, said: Call, call: Call, guided: Tensor | None, chain: Chain) -> Jump:
    """The rule that takes the predictions of both ends of a jump, and the divergence from a probe's predictions.

    Where the next predictions are missing (the run ends, the concept stops applying, or its difference is held),
    Algorithm 2 stands in, less the part of the divergence that the step's noise does not cancel. Where no probe was
    made yet, Algorithm 2 stands in alone.
    """
    if call.negative is not None and call.gap is not None:
        gap = ((call.gap if said.gap is None else said.gap) + call.gap) / 2
        return Jump(path_evidence(said, call, gap, chain.weight))
    evidence = held_evidence(said, call, said, chain.weight)
    if call.negative is None and said.gap is not None:
        fraction = chain.fraction(said.sigma, call.sigma)
        evidence = evidence - (1 - (1.0 if fraction is None else fraction)) * divergence_evidence(said, call, said.gap)
    return Jump(evidence)


def elbo(start: PathPoint, said: Call, call: Call, guided: Tensor | None, chain: Chain) -> Jump:
    """The rule that asks how well all predictions so far foretold the image that the reference now expects.

    It needs no noise from the sampler. Where the run ends without another prediction, nothing is counted: a run that
    goes on from there does.
    """
    foretold = foretell(said, call, start.foretold, 1.0 if chain.noisy else DETERMINISTIC_FACTOR, chain.weight)
    if call.reference is None:
        return Jump(torch.zeros_like(start.log_p), foretold=foretold)
    return Jump(elbo_evidence(foretold, call, chain.weight), foretold=foretold)


EVIDENCE: dict[str, Callable[[PathPoint, Call, Call, Tensor | None, Chain], Jump]] = {
    "algorithm_2": algorithm_2,
    "step_noise": step_noise,
    "probe": probe,
    "elbo": elbo,
}
"""The rules by name. Each takes the point where a jump starts, what the model said there, what it says at the jump's
end, the estimate that the sampler was given in between, and the chain."""


def advance(
    log_p: Tensor, evidence: Tensor, temperature: float | Tensor, offset: float | Tensor, bounds: Settings
) -> Tensor:
    """log p(c-|x') after one jump, within ``bounds``: the recursion of Algorithm 2."""
    return clamped(log_p + temperature * evidence + offset, bounds)


def offset_evidence(settings: Settings, kernel: ReverseKernel, integrated: IntegratedOffset) -> float:
    """What the offset adds to log p(c-|x) over one jump, in nats, in the form that the settings ask for.

    "per_step": delta / (2 beta-tilde) of this jump (Algorithm 2). "integrated": delta (F(sigma) - F(sigma')).
    "total": the same, with delta chosen such that the whole chain adds ``settings.offset`` nats.
    """
    if settings.offset_form == "per_step":
        return settings.offset / (2 * kernel.vp_variance)
    share = integrated(kernel.sigma) - integrated(kernel.next_sigma)
    return settings.offset * (share / integrated.total if settings.offset_form == "total" else share)


def drift_evidence(settings: Settings, kernel: ReverseKernel, energy: Tensor) -> Tensor | float:
    """What the settings' drift adds to log p(c-|x) over one jump, in nats.

    A drift gives back what errors lost. It is measured on some concepts and holds for all of a model, but errors can
    lose no more than half of the jump's ``energy``, (batch,). The share ERRORS of this half is given back at most, so
    that the posterior of a concept which changes next to nothing in the predictions stays where it is.
    """
    nats = drift_along(settings, kernel)
    return (ERRORS / 2 * energy).clamp(max=nats) if nats > 0 else nats


def drift_along(settings: Settings, kernel: ReverseKernel) -> float:
    """The nats between two noise levels on the settings' curve; many small jumps add as much as one."""
    if not settings.drift:
        return 0.0
    log_sigmas = [math.log(sigma) for sigma, _ in reversed(settings.drift)]
    nats = [value for _, value in reversed(settings.drift)]
    return interpolated(log_sigmas, nats, kernel.next_sigma) - interpolated(log_sigmas, nats, kernel.sigma)


def clamped(log_p: Tensor, settings: Settings) -> Tensor:
    """log p within the settings' bounds, (batch,)."""
    return log_p.clamp(math.log(settings.p_min), math.log(settings.p_max))


def _counted_later(foretold: Foretold, call: Call, chain: Chain) -> Jump:
    """The jump to the first call of a run, which another run left uncounted by the rule ``elbo``."""
    there = foretold.to(call.x.device)
    return Jump(elbo_evidence(there, call, chain.weight), foretold=there)


def _log_prior(path: Path, call: Call, settings: Settings) -> Tensor:
    if path.log_prior is not None:
        return path.log_prior.to(call.x.device)
    dtype = torch.promote_types(call.x.dtype, torch.float32)
    return torch.full((len(call.x),), math.log(settings.prior), dtype=dtype, device=call.x.device)


def _is_trial(path: Path, call: Call, settings: Settings, chain: Chain) -> bool:
    """Whether this call is a trial point: the first at its level, which the sampler reached without noise.

    A trial point keeps the posterior from which its step started: without noise, Algorithm 2 would miss the
    divergence.
    """
    if not chain.trial_points or not call.applies:
        return False
    probed = settings.rule == "probe" and call.gap is not None and call.negative is not None
    return path.at(call.sigma) is None and not probed and chain.rule(settings) != "elbo"
