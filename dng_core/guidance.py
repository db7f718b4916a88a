"""The guidance of Algorithm 1: at each model call, the base prediction is pushed away from what is undesired.

All predictions are denoised ones (estimates of x_0), (batch, ...). With D = x - sigma eps, the paper's
eps_hat = eps - lambda (eps(c-) - eps) is D_hat = D - lambda (D_neg - D_ref). :func:`guide` is the body of
Algorithm 1's loop, and :func:`combine` is the one place where a push is computed. :class:`NegativeGuidance` keeps the
paths of one run for samplers that call it step by step.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, NamedTuple

import torch
from torch import Tensor

from .economy import Economy, Watch
from .evidence import Call, Foretold, Probe, Prober
from .kernels import at_least_float32, float32_copy, on_device, per_image
from .posterior import Chain, Path, step
from .settings import Settings

Negatives = Sequence[Tensor | None]
"""The denoised prediction under each undesired concept, (batch, ...); None where a concept does not apply."""


class Held(Enum):
    """Stands in the place of a prediction that was not evaluated: the last difference is held (:mod:`.economy`)."""

    HELD = "held"


HELD: Final = Held.HELD


class Some(NamedTuple):
    """Stands in the place of a prediction that was evaluated for some images alone (:meth:`Guidance.awake`).

    ``rows``: the places of these images in the batch, rising. ``at``: the same places as a tensor, (len(rows),), on
    the device of the predictions (:func:`~.economy.places`). ``negative``: their predictions, (len(rows), ...).
    """

    rows: Sequence[int]
    at: Tensor
    negative: Tensor


class Probed(NamedTuple):
    """A probe, and the reference and the undesired predictions at its state."""

    probe: Probe
    reference: Tensor
    negatives: Negatives


Given = Tensor | Some | Held | None
"""The undesired prediction that a call is given; None where its concept does not apply."""


class Guided(NamedTuple):
    """What one model call gives: the guided prediction, and for each concept its path, log p and scale, (batch,)."""

    paths: list[Path]
    denoised: Tensor
    log_posteriors: list[Tensor]
    scales: list[Tensor]


def guide(
    paths: Sequence[Path], base: Tensor, calls: Sequence[Call], settings: Sequence[Settings], chain: Chain
) -> Guided:
    """The body of Algorithm 1's loop at one model call: the paths that go on, and the guided prediction.

    The paper updates p at the end of a step. Here the update comes at the next call, where the new state is known; the
    numbers are the same. At the first call p is the prior.

    Parameters
    ----------
    paths, calls, settings: one of each for every undesired concept. The calls share their state and noise level.
    base: (batch, ...), what the sampler would use without guidance; often the reference itself. The guided prediction
        has its dtype.
    """
    stepped = [step(*concept, chain) for concept in zip(paths, calls, settings, strict=True)]
    counted = [_counted(log_p, call.applies) for (_, log_p), call in zip(stepped, calls, strict=True)]
    scales = dynamic_scales(counted, settings, calls[0].sigma)
    applying = [(call, scale) for call, scale in zip(calls, scales, strict=True) if call.applies]
    guided = combine(base, [call.difference for call, _ in applying], [scale for _, scale in applying])
    noise_counts = any(s.rule == "step_noise" for s in settings)
    given = at_least_float32(guided).clone() if noise_counts else None
    return Guided([replace(path, guided=given) for path, _ in stepped], guided, [p for _, p in stepped], scales)


def dynamic_scales(
    log_posteriors: Sequence[Tensor], settings: Sequence[Settings], sigma: float | Sequence[float]
) -> list[Tensor]:
    """lambda_i = lambda_0i p_i / (1 - sum_j p_j), capped at each concept's ``max_scale``; (batch,) each.

    For one concept this is the paper's eq. 8, lambda_0 p / (1 - p). Several concepts exclude one another: their
    posteriors are rescaled together where their sum exceeds the largest ``p_max``.

    A lambda_0 above 1 amplifies the exact push. At noise levels above ``evidence_above`` it amplifies only by how far
    the odds have risen above those of the prior: lambda_i = odds_i + (lambda_0i - 1) max(odds_i - prior odds_i, 0).
    Otherwise all images would be pushed by lambda_0 times the prior odds while nothing is known of them yet.

    Parameters
    ----------
    sigma: the noise level; one for each step where the log posteriors are those of several, (steps, batch).
    """
    logs, together = list(log_posteriors), log_posteriors[0]
    if len(logs) > 1:
        stacked = torch.stack(logs)
        limit = math.log(max(s.p_max for s in settings))
        stacked = stacked - (stacked.logsumexp(dim=0) - limit).clamp(min=0)
        logs, together = list(stacked.unbind()), stacked.logsumexp(dim=0)
    absent = -torch.expm1(together)
    none_expected = 1 - sum(s.prior for s in settings)
    return [
        _scale(log.exp() / absent, s.prior / none_expected, s, sigma).clamp(max=s.max_scale)
        for s, log in zip(settings, logs, strict=True)
    ]


def _scale(odds: Tensor, prior_odds: float, settings: Settings, sigma: float | Sequence[float]) -> Tensor:
    """The guidance scale at odds, before its cap; as :func:`dynamic_scales` has it."""
    scale = settings.guidance_scale
    if settings.evidence_above is None or scale <= 1:
        return scale * odds
    expected: float | Tensor
    if isinstance(sigma, Sequence):
        blind = [prior_odds if level > settings.evidence_above else 0.0 for level in sigma]
        expected = on_device(torch.tensor(blind, dtype=odds.dtype)[:, None], odds.device)
    else:
        expected = prior_odds if sigma > settings.evidence_above else 0.0
    return odds + (scale - 1) * (odds - expected).clamp(min=0)


def _counted(log_p: Tensor, applies: bool) -> Tensor:
    """log p, (batch,); minus infinity for a concept that does not apply, so that it neither pushes nor counts."""
    return log_p if applies else torch.full_like(log_p, -math.inf)


def combine(base: Tensor, directions: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """base - sum_i scale_i direction_i, for scales of shape (batch,); in the base's dtype."""
    guided = at_least_float32(base)
    for direction, scale in zip(directions, scales, strict=True):
        guided = guided - per_image(scale, base) * direction
    return guided.to(base.dtype)


@dataclass(frozen=True)
class Trace:
    """What guidance did over one run.

    ``sigmas``: (steps,) VE noise levels, falling. ``posterior`` and ``scale``: (steps, concepts, batch).
    ``log_posterior``: (concepts, batch), log p where the sampler stopped, from which a later run may go on; None if
    the trace was not told where. ``looked``: (steps, concepts) bool, False where the last difference of an undesired
    prediction was held for all images, or the concept does not apply; None if that was not noted. ``made`` and
    ``spared``: how many undesired predictions of single images were evaluated (at every call of the model, in between
    steps and by probes too), and how many were not. ``priors``: of each concept, where the posterior began; None if
    that was not noted. ``foretold``: of each concept, what such a later run needs by the rule "elbo". All values are
    float32 on the CPU.
    """

    sigmas: Tensor
    posterior: Tensor
    scale: Tensor
    log_posterior: Tensor | None = None
    looked: Tensor | None = None
    made: int = 0
    spared: int = 0
    priors: tuple[float, ...] | None = None
    foretold: tuple[Foretold | None, ...] | None = None

    def then(self, later: "Trace") -> "Trace":
        """This run and the one that went on from it, as one."""
        runs = [run for run in (self, later) if len(run.sigmas)] or [later]
        noted = [run.looked for run in runs if run.looked is not None]
        return Trace(
            sigmas=torch.cat([run.sigmas for run in runs]),
            posterior=torch.cat([run.posterior for run in runs]),
            scale=torch.cat([run.scale for run in runs]),
            log_posterior=later.log_posterior,
            looked=None if len(noted) < len(runs) else torch.cat(noted),
            made=self.made + later.made,
            spared=self.spared + later.spared,
            priors=self.priors or later.priors,
            foretold=later.foretold,
        )


def looks_along(paths: Sequence[Path], span: slice = slice(None)) -> list[list[bool]]:
    """For a span of a run's points, (steps, concepts): whether the undesired prediction was evaluated there."""
    of_concepts = [[point.applies and not point.held for point in path.points[span]] for path in paths]
    return [list(step) for step in zip(*of_concepts, strict=True)]


def tracked(paths: Sequence[Path], settings: Sequence[Settings], span: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """The posterior and the guidance scale at a span of a run's points, (steps, concepts, batch) each.

    The scale is 0 where a concept does not apply.
    """
    points = [path.points[span] for path in paths]
    logs = [torch.stack([point.log_p for point in of_concept]) for of_concept in points]
    counted = [torch.stack([_counted(point.log_p, point.applies) for point in of_concept]) for of_concept in points]
    levels = [point.sigma for point in points[0]]
    return torch.stack(logs, dim=1).exp(), torch.stack(dynamic_scales(counted, settings, levels), dim=1)


class Guidance(ABC):
    """Guides one sampling run, call by call: DNG's :class:`NegativeGuidance`, or a baseline of :mod:`.baselines`.

    Make a new one for every run.

    Parameters
    ----------
    concepts: how many undesired concepts there are.
    economies: for each concept, when its prediction is evaluated; at every call if None.
    """

    def __init__(self, concepts: int, economies: Sequence[Economy] | None = None) -> None:
        if concepts < 1:
            raise ValueError("negative guidance needs the settings of at least one concept")
        economies = [Economy()] * concepts if economies is None else economies
        if len(economies) != concepts:
            raise ValueError(f"{concepts} concepts were set up with {len(economies)} economies")
        self._watches = [Watch(economy) for economy in economies]
        self._all_finite: Tensor | None = None

    def looks(self, sigma: float) -> list[bool]:
        """For each concept, whether its prediction should be evaluated at the call that comes, at ``sigma``.

        Where it is not, hand :data:`HELD` to the call in its place. Evaluated all the same, it counts as a look.
        """
        return [rows is None or bool(rows) for rows in self.awake(sigma)]

    def awake(self, sigma: float) -> list[list[int] | None]:
        """For each concept, the images whose prediction should be evaluated at the call that comes; None for all.

        Where these are some, the prediction may be evaluated for them alone: then hand :class:`Some` to the call.
        """
        return [watch.awake(sigma) for watch in self._watches]

    def probe(self, x: Tensor, sigma: float) -> Probe | None:
        """Where to evaluate the reference and the undesired once more; None where that is not needed.

        Ask once before each call, and hand what was evaluated back as ``probed``: asked again at the same level, the
        answer is None.
        """
        return None

    def __call__(
        self,
        x: Tensor,
        sigma: float,
        base: Tensor,
        reference: Tensor,
        negatives: Sequence[Given],
        probed: Probed | None = None,
    ) -> Tensor:
        """The guided denoised prediction at the VE state ``x`` (batch, ...), in the base's dtype.

        An undesired prediction does not push where it is NaN or infinite (half precision overflows).

        Parameters
        ----------
        base: what the sampler would use without guidance.
        reference: the prediction that the undesired ones are compared with; often the base itself.
        negatives: the prediction under each undesired concept; :class:`Some` where it was evaluated for some images,
            :data:`HELD` where it was for none; None where a concept does not apply at this noise level, so that it
            neither pushes nor moves its posterior.
        probed: what :meth:`probe` gave, and the predictions there.
        """
        if len(negatives) != len(self._watches):
            raise ValueError(f"{len(self._watches)} concepts were set up but {len(negatives)} predictions given")
        reference = float32_copy(reference)  # samplers reuse their tensors
        seen: list[Tensor | None] = [None] * len(negatives)
        held: list[Tensor | None] = [None] * len(negatives)
        for i, (watch, negative) in enumerate(zip(self._watches, negatives, strict=True)):
            if negative is None:
                watch.forget()
            elif isinstance(negative, Held):
                held[i] = watch.held()
            elif isinstance(negative, Some):
                some = self._sound(negative.negative, reference[negative.at])
                seen[i] = known = watch.completed(some, negative.at, reference)
                watch.looked(sigma, known, reference, negative.rows)
            else:
                seen[i] = known = self._sound(negative, reference)
                watch.looked(sigma, known, reference)
        return self.guided(x, sigma, base, reference, seen, held, probed)

    def _sound(self, negative: Tensor, reference: Tensor) -> Tensor:
        """The prediction with the reference where it is NaN or infinite, which is noted."""
        sound = is_finite(negative)
        self._all_finite = sound.all() if self._all_finite is None else self._all_finite & sound.all()
        return torch.where(sound, negative, reference)

    @abstractmethod
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
        """What a call gives, from copies in float32 or better of the reference and of the undesired predictions.

        Every number of the latter is finite. ``held``: for each that was not evaluated, the last difference, (batch,
        ...); there and where a concept does not apply the prediction is None.
        """

    def ignored(self) -> bool:
        """Whether an undesired prediction held NaN or infinite values, which did not push. Waits for the device."""
        return self._all_finite is not None and not bool(self._all_finite)

    def trace(self, end: tuple[Tensor, float] | None = None) -> Trace | None:
        """What was tracked so far; None where nothing is. Waits for the device: call it after the run.

        ``end``: the VE state (batch, ...) and the noise level where the sampler stopped.
        """
        return None


def is_finite(values: Tensor) -> Tensor:
    """Where ``values`` are neither NaN nor infinite. ``isfinite`` goes over large latents four times, this twice."""
    return (values - values) == 0


class NegativeGuidance(Guidance):
    """Guides away from one or more undesired concepts by DNG.

    Between calls it keeps the concepts' paths and the covariance gaps that the last probe showed.

    Parameters
    ----------
    settings: one for each concept.
    chain: what is known of the sampler's steps.
    log_priors: (batch,) start values for each concept, in place of their priors.
    foretold: of each concept, by the run that this one goes on from (:class:`Trace`).
    seed: of the probes of concepts with the rule "probe".
    economies: for each concept, when its prediction is evaluated; at every call if None.
    """

    def __init__(
        self,
        settings: Sequence[Settings],
        chain: Chain | None = None,
        log_priors: Sequence[Tensor] | Tensor | None = None,
        seed: int = 0,
        economies: Sequence[Economy] | None = None,
        foretold: Sequence[Foretold | None] | None = None,
    ) -> None:
        super().__init__(len(settings), economies)
        if sum(s.prior for s in settings) >= 1:
            raise ValueError("the priors of all concepts together must stay below 1; lower some of them")
        self.settings = tuple(settings)
        self.chain = chain or Chain()
        priors = [None] * len(settings) if log_priors is None else log_priors
        before = foretold or [None] * len(settings)
        self.paths = [Path(log_prior=prior, foretold=known) for prior, known in zip(priors, before, strict=True)]
        self._gaps: list[Tensor | None] = [None] * len(settings)
        self._prober = Prober(seed, self.chain.weight)

    def awake(self, sigma: float) -> list[list[int] | None]:
        """As for all guidance. A rule that compares the differences of two calls needs both of all images."""
        awake = zip(super().awake(sigma), self.settings, strict=True)
        return [None if rows and settings.rule in ("step_noise", "probe") else rows for rows, settings in awake]

    def probe(self, x: Tensor, sigma: float) -> Probe | None:
        return self._prober.next(x, sigma) if any(s.rule == "probe" for s in self.settings) else None

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
        if probed is not None:
            self._update_gaps(reference, negatives, probed)
        state = float32_copy(x)  # samplers reuse their tensors
        calls = [
            Call(state, sigma, reference, negative, gap, old)
            for negative, gap, old in zip(negatives, self._gaps, held, strict=True)
        ]
        self.paths, denoised, logs, scales = guide(self.paths, base, calls, self.settings, self.chain)
        for watch, log_p, scale, settings in zip(self._watches, logs, scales, self.settings, strict=True):
            watch.note(log_p, scale, settings.temperature)
        return denoised

    def _update_gaps(self, reference: Tensor, negatives: Negatives, probed: Probed) -> None:
        for i, (negative, beside) in enumerate(zip(negatives, probed.negatives, strict=True)):
            if negative is not None and beside is not None:
                self._watches[i].made += len(beside)
                beside = torch.where(is_finite(beside), beside, probed.reference)
                here = negative - reference
                there = at_least_float32(beside) - at_least_float32(probed.reference)
                gap = probed.probe.covariance_gap(here, there)
                self._gaps[i] = torch.where(gap.isfinite(), gap, torch.zeros_like(gap))

    def trace(self, end: tuple[Tensor, float] | None = None) -> Trace:
        """What was tracked so far; empty if nothing was. Waits for the device.

        No predictions are known at ``end``. So the jump there is counted by Algorithm 2; the rule "probe" also
        subtracts the divergence that the step's noise does not cancel, and the rule "elbo" leaves the jump to the run
        that goes on.
        """
        paths, final, priors = self.paths, None, tuple(s.prior for s in self.settings)
        if end is not None:
            stepped = [step(p, Call(*end), s, self.chain) for p, s in zip(paths, self.settings, strict=True)]
            final = torch.stack([log_p for _, log_p in stepped]).float().cpu()
        if not paths[0].points:
            nothing = torch.zeros(0, len(paths), 0)
            looked = torch.zeros(0, len(paths), dtype=torch.bool)
            return Trace(torch.zeros(0), nothing, nothing, final, looked, priors=priors)
        left: tuple[Foretold | None, ...] | None = None
        if end is not None:
            last = [path.points[-1].foretold for path, _ in stepped]
            left = tuple(known.to("cpu", torch.float32) if known else None for known in last)
        posterior, scale = (values.float().cpu() for values in tracked(paths, self.settings))
        looked = torch.tensor(looks_along(paths))
        made, spared = (sum(counts) for counts in zip(*((w.made, w.spared) for w in self._watches), strict=True))
        sigmas = torch.tensor([point.sigma for point in paths[0].points])
        return Trace(sigmas, posterior, scale, final, looked, made, spared, priors, left)
