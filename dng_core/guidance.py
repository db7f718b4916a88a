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
from typing import NamedTuple

import torch
from torch import Tensor

from .evidence import Call, Probe, Prober
from .kernels import at_least_float32, per_image
from .posterior import Chain, Path, step
from .settings import Settings

Negatives = Sequence[Tensor | None]
"""The denoised prediction under each undesired concept, (batch, ...); None where it is not evaluated."""


class Probed(NamedTuple):
    """A probe, and the reference and the undesired predictions at its state."""

    probe: Probe
    reference: Tensor
    negatives: Negatives


def guide(
    paths: Sequence[Path], base: Tensor, calls: Sequence[Call], settings: Sequence[Settings], chain: Chain
) -> tuple[list[Path], Tensor]:
    """The body of Algorithm 1's loop at one model call: the paths that go on, and the guided prediction.

    The paper updates p at the end of a step. Here the update comes at the next call, where the new state is known; the
    numbers are the same. At the first call p is the prior.

    Parameters
    ----------
    paths, calls, settings: one of each for every undesired concept. The calls share their state and noise level.
    base: (batch, ...), what the sampler would use without guidance; often the reference itself.

    Returns
    -------
    The paths, and the guided prediction in the base's dtype.
    """
    stepped = [step(*concept, chain) for concept in zip(paths, calls, settings, strict=True)]
    counted = [_counted(log_p, call.negative is not None) for (_, log_p), call in zip(stepped, calls, strict=True)]
    scales = dynamic_scales(counted, settings)
    applying = [(call, scale) for call, scale in zip(calls, scales, strict=True) if call.negative is not None]
    guided = combine(base, [call.difference for call, _ in applying], [scale for _, scale in applying])
    noise_counts = any(s.rule == "step_noise" for s in settings)
    given = at_least_float32(guided).clone() if noise_counts else None
    return [replace(path, guided=given) for path, _ in stepped], guided


def dynamic_scales(log_posteriors: Sequence[Tensor], settings: Sequence[Settings]) -> list[Tensor]:
    """lambda_i = lambda_0i p_i / (1 - sum_j p_j), capped at each concept's ``max_scale``; (batch,) each.

    For one concept this is the paper's eq. 8, lambda_0 p / (1 - p). Several concepts exclude one another: their
    posteriors are rescaled together where their sum exceeds the largest ``p_max``.
    """
    logs = torch.stack(list(log_posteriors))
    limit = math.log(max(s.p_max for s in settings))
    logs = logs - (logs.logsumexp(dim=0) - limit).clamp(min=0)
    absent = -torch.expm1(logs.logsumexp(dim=0))
    return [
        (s.guidance_scale * log.exp() / absent).clamp(max=s.max_scale) for s, log in zip(settings, logs, strict=True)
    ]


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
    the trace was not told where. All float32 on the CPU.
    """

    sigmas: Tensor
    posterior: Tensor
    scale: Tensor
    log_posterior: Tensor | None = None

    def then(self, later: "Trace") -> "Trace":
        """This run and the one that went on from it, as one."""
        runs = [run for run in (self, later) if len(run.sigmas)] or [later]
        return Trace(
            sigmas=torch.cat([run.sigmas for run in runs]),
            posterior=torch.cat([run.posterior for run in runs]),
            scale=torch.cat([run.scale for run in runs]),
            log_posterior=later.log_posterior,
        )


def tracked(paths: Sequence[Path], settings: Sequence[Settings], span: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """The posterior and the guidance scale at a span of a run's points, (steps, concepts, batch) each.

    The scale is 0 where a concept does not apply.
    """
    points = [path.points[span] for path in paths]
    logs = [torch.stack([point.log_p for point in of_concept]) for of_concept in points]
    counted = [torch.stack([_counted(point.log_p, point.applies) for point in of_concept]) for of_concept in points]
    return torch.stack(logs, dim=1).exp(), torch.stack(dynamic_scales(counted, settings), dim=1)


class Guidance(ABC):
    """Guides one sampling run, call by call: DNG's :class:`NegativeGuidance`, or a baseline of :mod:`.baselines`.

    Make a new one for every run.

    Parameters
    ----------
    concepts: how many undesired concepts there are.
    """

    def __init__(self, concepts: int) -> None:
        if concepts < 1:
            raise ValueError("negative guidance needs the settings of at least one concept")
        self._concepts = concepts
        self._ignored: Tensor | None = None

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
        negatives: Negatives,
        probed: Probed | None = None,
    ) -> Tensor:
        """The guided denoised prediction at the VE state ``x`` (batch, ...), in the base's dtype.

        An undesired prediction does not push where it is NaN or infinite (half precision overflows).

        Parameters
        ----------
        base: what the sampler would use without guidance.
        reference: the prediction that the undesired ones are compared with; often the base itself.
        negatives: the prediction under each undesired concept; None where a concept does not apply at this noise
            level, so that it neither pushes nor moves its posterior.
        probed: what :meth:`probe` gave, and the predictions there.
        """
        if len(negatives) != self._concepts:
            raise ValueError(f"{self._concepts} concepts were set up but {len(negatives)} predictions given")
        for negative in negatives:
            if negative is not None:
                bad = (~negative.isfinite()).any()
                self._ignored = bad if self._ignored is None else self._ignored | bad
        return self.guided(x, sigma, base, reference, [finite(n, reference) for n in negatives], probed)

    @abstractmethod
    def guided(
        self, x: Tensor, sigma: float, base: Tensor, reference: Tensor, negatives: Negatives, probed: Probed | None
    ) -> Tensor:
        """What a call gives, from copies of the undesired predictions in which every number is finite."""

    def ignored(self) -> bool:
        """Whether an undesired prediction held NaN or infinite values, which did not push. Waits for the device."""
        return self._ignored is not None and bool(self._ignored)

    def trace(self, end: tuple[Tensor, float] | None = None) -> Trace | None:
        """What was tracked so far; None where nothing is. Waits for the device: call it after the run.

        ``end``: the VE state (batch, ...) and the noise level where the sampler stopped.
        """
        return None


def finite(negative: Tensor | None, reference: Tensor) -> Tensor | None:
    """A copy of ``negative``, with the reference in place of NaN and infinity; None for None."""
    return None if negative is None else torch.where(negative.isfinite(), negative, reference)


class NegativeGuidance(Guidance):
    """Guides away from one or more undesired concepts by DNG.

    Between calls it keeps the concepts' paths and the covariance gaps that the last probe showed.

    Parameters
    ----------
    settings: one for each concept.
    chain: what is known of the sampler's steps.
    log_priors: (batch,) start values for each concept, in place of their priors.
    seed: of the probes of concepts with the rule "probe".
    """

    def __init__(
        self,
        settings: Sequence[Settings],
        chain: Chain | None = None,
        log_priors: Sequence[Tensor] | Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(len(settings))
        if sum(s.prior for s in settings) >= 1:
            raise ValueError("the priors of all concepts together must stay below 1; lower some of them")
        self.settings = tuple(settings)
        self.chain = chain or Chain()
        priors = [None] * len(settings) if log_priors is None else log_priors
        self.paths = [Path(log_prior=prior) for prior in priors]
        self._gaps: list[Tensor | None] = [None] * len(settings)
        self._prober = Prober(seed, self.chain.weight)

    def probe(self, x: Tensor, sigma: float) -> Probe | None:
        return self._prober.next(x, sigma) if any(s.rule == "probe" for s in self.settings) else None

    def guided(
        self, x: Tensor, sigma: float, base: Tensor, reference: Tensor, negatives: Negatives, probed: Probed | None
    ) -> Tensor:
        if probed is not None:
            self._update_gaps(reference, negatives, probed)
        kept = at_least_float32(x).clone(), sigma, at_least_float32(reference).clone()  # samplers reuse their tensors
        calls = [
            Call(*kept, None if negative is None else at_least_float32(negative), gap)
            for negative, gap in zip(negatives, self._gaps, strict=True)
        ]
        self.paths, guided = guide(self.paths, base, calls, self.settings, self.chain)
        return guided

    def _update_gaps(self, reference: Tensor, negatives: Negatives, probed: Probed) -> None:
        for i, (negative, beside) in enumerate(zip(negatives, probed.negatives, strict=True)):
            beside = finite(beside, probed.reference)
            if negative is not None and beside is not None:
                here = at_least_float32(negative) - at_least_float32(reference)
                there = at_least_float32(beside) - at_least_float32(probed.reference)
                gap = probed.probe.covariance_gap(here, there)
                self._gaps[i] = torch.where(gap.isfinite(), gap, torch.zeros_like(gap))

    def trace(self, end: tuple[Tensor, float] | None = None) -> Trace:
        """What was tracked so far; empty if nothing was. Waits for the device.

        No predictions are known at ``end``. So the jump there is counted by Algorithm 2; the rule "probe" also
        subtracts the divergence that the step's noise does not cancel.
        """
        paths, final = self.paths, None
        if end is not None:
            stepped = [step(p, Call(*end), s, self.chain) for p, s in zip(paths, self.settings, strict=True)]
            final = torch.stack([log_p for _, log_p in stepped]).float().cpu()
        if not paths[0].points:
            nothing = torch.zeros(0, len(paths), 0)
            return Trace(torch.zeros(0), nothing, nothing, final)
        posterior, scale = (values.float().cpu() for values in tracked(paths, self.settings))
        return Trace(torch.tensor([point.sigma for point in paths[0].points]), posterior, scale, final)
