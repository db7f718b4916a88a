"""The posterior p(c-|x) along a sampling run: Algorithm 2 of Koulischer et al. (2025), and the tracker that runs it.

All posteriors are natural logarithms, one per image of a batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import VE, NoiseFrame, ReverseKernel, at_least_float32
from .schedules import IntegratedOffset
from .settings import Settings

MAX_ANCHOR_STATES = 4
"""States kept by the tracker. A sampler returns at most one step back (trial points, rejected adaptive steps)."""

ON_SCHEDULE = 1e-5
"""How far, relatively, a call's level may be from the sampler's schedule by rounding."""

SAME_LEVEL = 3 * ON_SCHEDULE
"""Two calls on one scheduled level differ by at most twice the above. Some samplers reach the next level by a formula
for their midpoint (``dpmpp_2s_ancestral``), a few units of rounding off."""


LEAST_NOISE_FRACTION = 0.4
"""Below this share of the exact kernel's noise, a step's own noise says too little about the divergence."""

GAP_MEMORY = 4.0
"""How fast estimates of the covariance gap by earlier steps fade: as this power of sigma. Exact predictions would bear
2.5; the posteriors of the MNIST network are best at 4."""

LONGEST_MEMORY = 0.8
"""What is left of earlier estimates after a step at most, however short: small steps come back to Algorithm 2."""

NoiseFraction = Callable[[float, float], float]
"""(sigma, sigma') -> variance that the sampler injects over that step, as a share of the exact kernel's."""


def posterior_increment(
    next_state: Tensor,
    state: Tensor,
    negative: Tensor,
    reference: Tensor,
    next_level: float,
    level: float,
    frame: NoiseFrame = VE,
    weight: Tensor | None = None,
) -> Tensor:
    """log p(x'|x, c-) - log p(x'|x): what one reverse jump adds to log p(c-|x) at temperature 1, offset 0.

    Algorithm 2's difference of squared distances, written as one inner product, so that no two large norms cancel:

        (1 / sigma'^2) < D_neg - D_ref , x' - r x - (1 - r) (D_neg + D_ref) / 2 >

    Parameters
    ----------
    next_state, state: (batch, ...), after and before the jump, in ``frame``.
    negative, reference: (batch, ...), denoised predictions (estimates of x_0) at ``state`` with the undesired
        condition and without it.
    next_level, level: noise levels in ``frame``; ``next_level`` is below ``level`` and above 0.
    weight: broadcastable to the state; elements of weight 0 do not count (outside an inpainting mask).

    Returns
    -------
    (batch,), in float32 or the states' own precision where that is higher.
    """
    kernel = ReverseKernel(frame.sigma(level), frame.sigma(next_level))
    negative, reference = at_least_float32(negative), at_least_float32(reference)
    moved = _moved(next_state, state, next_level, level, frame)
    product = (negative - reference) * (moved - (1 - kernel.ratio) / 2 * (negative + reference))
    return _weighted_sum(product, weight) / kernel.next_sigma**2


def _moved(next_state: Tensor, state: Tensor, next_level: float, level: float, frame: NoiseFrame) -> Tensor:
    """x' - r x in the VE frame, (batch, ...)."""
    moved = frame.scale(next_level) * at_least_float32(next_state)
    return moved - frame.carry(level, next_level) * at_least_float32(state)


def _weighted_sum(product: Tensor, weight: Tensor | None) -> Tensor:
    """Sum over the elements that count, (batch,)."""
    if weight is not None:
        product = product * weight
    return product.flatten(1).sum(dim=1)


def path_increment(
    next_state: Tensor,
    state: Tensor,
    predictions: tuple[Tensor, Tensor],
    next_predictions: tuple[Tensor, Tensor],
    covariance_gap: Tensor,
    next_level: float,
    level: float,
    frame: NoiseFrame = VE,
    weight: Tensor | None = None,
) -> Tensor:
    """What a move adds to log p(c-|x), whatever path or noise took the state there.

    log p is a function of the state and of the noise level alone. By Tweedie's formula and the heat equation, with
    Delta = D_neg - D_ref and D-bar their mean,

        d log p = < Delta, dx > / sigma^2 + (< Delta, D-bar - x > / sigma^3 + div Delta / sigma) d sigma

    :func:`posterior_increment` integrates all but the divergence, for predictions that stay as they are. Their mean
    over both ends is the trapezoidal rule, and div Delta = G / sigma^2 with G the slowly varying ``covariance_gap``
    adds -G (1 - r) / (2 sigma'^2). Where every step's noise is the exact kernel's, the divergence cancels the
    quadratic variation on average, and Algorithm 2 does without both.

    Parameters
    ----------
    predictions, next_predictions: (D_neg, D_ref) at ``state`` and at ``next_state``.
    covariance_gap: (batch,), tr Cov[x_0 | x, c-] - tr Cov[x_0 | x], see :mod:`.divergence`.
    """
    kernel = ReverseKernel(frame.sigma(level), frame.sigma(next_level))
    ends = [
        posterior_increment(next_state, state, *pair, next_level, level, frame, weight)
        for pair in (predictions, next_predictions)
    ]
    return (ends[0] + ends[1]) / 2 - covariance_gap * (1 - kernel.ratio) / (2 * kernel.next_sigma**2)


def gap_of_step(
    next_state: Tensor,
    state: Tensor,
    predictions: tuple[Tensor, Tensor],
    next_predictions: tuple[Tensor, Tensor],
    guided: Tensor,
    noise_fraction: float,
    next_level: float,
    level: float,
    frame: NoiseFrame = VE,
    weight: Tensor | None = None,
) -> Tensor:
    """The covariance gap of :func:`path_increment`, (batch,), as the step's own noise shows it.

    A sampler that moved towards the estimate ``guided`` drew n = x' - r x - (1 - r) ``guided``, of ``noise_fraction``
    f (above 0) times the exact kernel's variance. That noise is a probe of the divergence: on average

        < Delta(x') - Delta(x), n > = f (1 - r) G

    At f = 1, :func:`path_increment` with it is Algorithm 2, but for how the predictions change along the step's drift:
    the noise is weighed by Delta before the step, as in Algorithm 2, the drift by the mean of both ends. A single
    estimate is noisy; the tracker averages it with those of the steps before.
    """
    kernel = ReverseKernel(frame.sigma(level), frame.sigma(next_level))
    before, after = (at_least_float32(pair[0]) - at_least_float32(pair[1]) for pair in (predictions, next_predictions))
    noise = _moved(next_state, state, next_level, level, frame) - (1 - kernel.ratio) * guided
    return _weighted_sum((after - before) * noise, weight) / (noise_fraction * (1 - kernel.ratio))


def offset_increment(settings: Settings, kernel: ReverseKernel, integrated: IntegratedOffset) -> float:
    """What the offset adds to log p(c-|x) over one jump, in the form that the settings ask for.

    "per_step": delta / (2 beta-tilde) of this jump (Algorithm 2). "integrated": delta (F(sigma) - F(sigma')).
    "total": the same, with delta chosen such that the whole chain adds ``settings.offset`` nats.
    """
    if settings.offset_form == "per_step":
        return settings.offset / (2 * kernel.vp_variance)
    share = integrated(kernel.sigma) - integrated(kernel.next_sigma)
    return settings.offset * (share / integrated.total if settings.offset_form == "total" else share)


def advance(log_posterior: Tensor, increment: Tensor, temperature: float | Tensor, offset: float | Tensor) -> Tensor:
    """log p(c-|x') after one jump, before it is clamped: the recursion of Algorithm 2."""
    return log_posterior + temperature * increment + offset


@dataclass
class Anchor:
    """A point of the tracked chain: noise level, log-posterior and guidance scale, and what the next jump needs."""

    level: float
    log_posterior: Tensor
    scale: Tensor
    state: Tensor | None
    negative: Tensor | None
    reference: Tensor | None
    covariance_gap: Tensor | None = None
    noise_gap: Tensor | None = None
    """The covariance gap as the noise of the steps up to here shows it."""

    @property
    def predictions(self) -> tuple[Tensor, Tensor] | None:
        """(D_neg, D_ref) here; None where the concept does not apply, or once they are no longer kept."""
        if self.negative is None or self.reference is None:
            return None
        return self.negative, self.reference


class PosteriorTracker:
    """Tracks log p(c-|x) of one concept along a sampler's model calls, however many calls a step takes.

    The points from which a jump may start form a stack of falling noise levels. A call first drops the anchors that
    are not above it in noise, then takes its posterior from the top one; it becomes an anchor itself if its level is
    on the sampler's schedule. So midpoints of a step never become anchors, a corrected point replaces its trial point,
    and a rejected step is forgotten. A point that was never anchored (no negative prediction there) is jumped over.

    Parameters
    ----------
    settings: prior, temperature, offset and clamps.
    integrated: the offset integrated over the model's training chain.
    levels: the sampler's schedule; None for adaptive samplers, where every call is an anchor.
    weight: see :func:`posterior_increment`.
    log_prior: (batch,) start values of log p in place of ``settings.prior``.
    noise_fraction: how the sampler's steps between scheduled levels compare with the exact kernel in noise; None
        where that is not known, and Algorithm 2 then stands in for the rule "step_noise".
    trial_points: whether the sampler reaches each level first by a trial step without noise, whose evidence says
        little: such a point keeps the posterior of the one before it.
    """

    def __init__(
        self,
        settings: Settings,
        integrated: IntegratedOffset,
        frame: NoiseFrame = VE,
        levels: Sequence[float] | None = None,
        weight: Tensor | None = None,
        log_prior: Tensor | None = None,
        noise_fraction: NoiseFraction | None = None,
        trial_points: bool = False,
    ) -> None:
        self.settings = settings
        self.frame = frame
        self.anchors: list[Anchor] = []
        self.integrated = integrated
        self._levels = levels
        self._weight = weight
        self._log_prior = log_prior
        self._noise_fraction = noise_fraction
        self._trial_points = trial_points
        self._tried = math.inf
        self._guided: Tensor | None = None
        self._noise_gap: Tensor | None = None

    def log_posterior(
        self,
        state: Tensor,
        level: float,
        predictions: tuple[Tensor, Tensor] | None = None,
        covariance_gap: Tensor | None = None,
    ) -> Tensor:
        """log p(c-|x) at a new state (batch, ...) of noise ``level``: (batch,), clamped to [p_min, p_max].

        ``predictions`` are (D_neg, D_ref) at the new state and ``covariance_gap`` (batch,) is that of
        :func:`path_increment`, which then takes the place of Algorithm 2's increment.
        """
        while self.anchors and self.anchors[-1].level <= level * (1 + SAME_LEVEL):
            dropped = self.anchors.pop()
            if not self.anchors:
                return self._restart(dropped, level, state)
        if not self.anchors:
            return self._clamp(self._prior(state))
        top = self.anchors[-1]
        self._noise_gap = top.noise_gap
        if top.state is None or top.predictions is None or level == 0:
            return top.log_posterior  # at level 0 the kernel has no width, and nothing is left to guide
        if predictions is not None and covariance_gap is None and self._is_trial(level):
            return top.log_posterior
        increment = self._increment(top, state, level, predictions, covariance_gap)
        kernel = ReverseKernel(self.frame.sigma(top.level), self.frame.sigma(level))
        offset = offset_increment(self.settings, kernel, self.integrated)
        moved = advance(top.log_posterior, increment, self.settings.temperature, offset)
        return self._clamp(moved)

    def anchor(
        self,
        state: Tensor,
        level: float,
        negative: Tensor | None,
        reference: Tensor,
        log_posterior: Tensor,
        scale: Tensor,
        covariance_gap: Tensor | None = None,
    ) -> None:
        """Let the chain continue from this point, if it is on the schedule.

        ``log_posterior`` and ``scale``, (batch,), are those of this point. Where the concept does not apply,
        ``negative`` is None, and the jump from here leaves the posterior as it is. The tensors are kept, not copied.
        """
        if self.anchors and not self._on_schedule(level):
            return
        noise_gap = self._noise_gap if self.anchors else None
        self.anchors.append(Anchor(level, log_posterior, scale, state, negative, reference, covariance_gap, noise_gap))
        if len(self.anchors) > MAX_ANCHOR_STATES:
            old = self.anchors[-1 - MAX_ANCHOR_STATES]
            old.state = old.negative = old.reference = old.covariance_gap = None

    def moves_towards(self, guided: Tensor) -> None:
        """The sampler was given the denoised estimate ``guided`` (batch, ...) at the call that was tracked last."""
        self._guided = guided

    def _increment(
        self,
        top: Anchor,
        state: Tensor,
        level: float,
        predictions: tuple[Tensor, Tensor] | None,
        covariance_gap: Tensor | None,
    ) -> Tensor:
        """log p at ``state`` less that at the anchor, by the best rule for what is known at both ends."""
        assert top.state is not None and top.predictions is not None
        ends, frame, weight = (level, top.level), self.frame, self._weight
        fraction, known = 1.0, False
        if self._noise_fraction is not None and self._on_schedule(level):
            fraction, known = self._noise_fraction(frame.sigma(top.level), frame.sigma(level)), True
        rule = self.settings.rule
        if rule == "probe" and predictions is not None and covariance_gap is not None:
            earlier = covariance_gap if top.covariance_gap is None else top.covariance_gap
            gap = (earlier + covariance_gap) / 2
            return path_increment(state, top.state, top.predictions, predictions, gap, *ends, frame, weight)
        noisy = known and fraction >= LEAST_NOISE_FRACTION and not math.isinf(frame.sigma(top.level))
        if rule == "step_noise" and noisy and predictions is not None and self._guided is not None:
            step = state, top.state, top.predictions, predictions
            gap = gap_of_step(*step, self._guided, fraction, *ends, frame, weight)
            if top.noise_gap is not None:
                memory = min((frame.sigma(level) / frame.sigma(top.level)) ** GAP_MEMORY, LONGEST_MEMORY)
                gap = torch.lerp(gap, top.noise_gap, memory)
            self._noise_gap = gap
            return path_increment(*step, gap, *ends, frame, weight)
        increment = posterior_increment(state, top.state, *top.predictions, *ends, frame=frame, weight=weight)
        if predictions is None and top.covariance_gap is not None:  # the run ends here, without another evaluation
            kernel = ReverseKernel(frame.sigma(top.level), frame.sigma(level))
            increment = increment - (1 - fraction) * top.covariance_gap * (1 - kernel.ratio) / (
                2 * kernel.next_sigma**2
            )
        return increment

    def _is_trial(self, level: float) -> bool:
        """Whether this is the first of the two calls at a level."""
        if not self._trial_points or math.isclose(level, self._tried, rel_tol=SAME_LEVEL):
            return False
        self._tried = level
        return True

    def _prior(self, state: Tensor) -> Tensor:
        if self._log_prior is not None:
            return self._log_prior.to(state.device)
        dtype = torch.promote_types(state.dtype, torch.float32)
        return torch.full((state.shape[0],), math.log(self.settings.prior), dtype=dtype, device=state.device)

    def _restart(self, first: Anchor, level: float, state: Tensor) -> Tensor:
        """A call at or above the first anchor: the same point again keeps its posterior, more noise starts afresh."""
        same = math.isclose(first.level, level, rel_tol=SAME_LEVEL) and first.log_posterior.shape[0] == state.shape[0]
        return first.log_posterior if same else self._clamp(self._prior(state))

    def _clamp(self, log_posterior: Tensor) -> Tensor:
        return log_posterior.clamp(math.log(self.settings.p_min), math.log(self.settings.p_max))

    def _on_schedule(self, level: float) -> bool:
        return self._levels is None or any(math.isclose(level, known, rel_tol=ON_SCHEDULE) for known in self._levels)
