"""Settings proposed from one unguided run: how much evidence for a concept its images bring, and when.

The run is recorded once, as evidence: the changes of log p(c-|x). Whatever other settings would have tracked along the
run follows from the record without another evaluation of the model.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .guidance import NegativeGuidance
from .kernels import ReverseKernel
from .posterior import advance, offset_evidence
from .settings import Settings, check

LIKELY = 0.5
"""Guidance is "on" in an image whose posterior is above this: the push is then above guidance_scale."""

SMALLEST_PRIOR = 0.01
"""Evidence that would ask for a smaller prior is taken for accumulated errors, and the temperature is lowered. The
smallest prior that the paper uses."""

LARGEST_PRIOR = 0.5
"""A concept that more than half of the images show is better put into the prompt than avoided."""

# The quantiles and grids below are choices, not measurements: tests/core/test_calibration.py shows what they lead to.
CLEAR = 0.5
"""An image shows the concept if its evidence peaks above this share of a clear image's."""

TOP = 0.95
"""The quantile of the peaks that stands for a clear image: the very largest may be an outlier."""

UPPER = 0.75
"""The quantile of the clear images' peaks that is taken for log(1 / prior): some images are borderline cases."""

LEAST_EVIDENCE = 0.5
"""Where no image's evidence peaks above this, in nats, none shows the concept."""

TYPICAL = 0.5
"""The share of the related images that must be on in time."""

NEARLY_ALL = 0.95
"""The share of the unrelated images that must stay below the scale."""

PRIOR_FACTORS = (1.0, 1.5, 2.5, 5.0, 10.0, 0.6, 0.3, 0.1)
TEMPERATURE_FACTORS = (1.0, 0.75, 0.5, 0.35, 0.2, 0.1)
OFFSETS = tuple(0.5 * i for i in range(21))
"""Offsets of the grid, in nats over the whole chain."""


@dataclass(frozen=True)
class Evidence:
    """What an unguided run showed of one concept.

    ``increments``: (jumps, batch), what each jump from step to step added to log p(c-|x) at temperature 1 and offset
    0. ``offsets``: (jumps,), what it would have added with an offset of 1 nat in all (offset_form "total").
    """

    increments: Tensor
    offsets: Tensor

    @property
    def peak(self) -> Tensor:
        """(batch,) the most that the evidence for the concept came to along the run, in nats; at least 0.

        Where a model's predictions of fine detail err, evidence sinks late in the run on every image, also on those
        that show the concept. The peak comes before.
        """
        return self.increments.cumsum(dim=0).amax(dim=0).clamp(min=0)


def evidence_of(guidance: NegativeGuidance) -> list[Evidence]:
    """What a run without guidance showed of each of its concepts; waits for the device.

    Of the run's settings only the rule counts; their guidance scale must be 0.

    Raises
    ------
    ValueError: if the run was too short to tell.
    """
    one_nat = Settings(offset=1.0, offset_form="total")
    found = []
    for path in guidance.paths:
        if len(path.points) < 3:
            raise ValueError(f"calibration needs a run of at least 3 steps, not {len(path.points)}")
        evidence = torch.stack([point.evidence for point in path.points[1:]]).double().cpu()
        kernels = [ReverseKernel(start.sigma, end.sigma) for start, end in pairwise(path.points)]
        offsets = [offset_evidence(one_nat, kernel, guidance.chain.offset) for kernel in kernels]
        found.append(Evidence(evidence, torch.tensor(offsets, dtype=torch.float64)))
    return found


def replay(
    evidence: Evidence, prior: Tensor, temperature: Tensor, offset: Tensor, bounds: Settings
) -> Iterator[Tensor]:
    """The posterior (..., batch) at each step that other settings would have tracked along the recorded run.

    Parameters
    ----------
    prior, temperature, offset: any one shape (...); the offset in nats over the whole chain.
    bounds: its p_min and p_max clamp the posterior.
    """
    log_posterior = prior.log()[..., None].expand(*prior.shape, evidence.increments.shape[1])
    yield log_posterior.exp()
    for increment, share in zip(evidence.increments, evidence.offsets, strict=True):
        log_posterior = advance(log_posterior, increment, temperature[..., None], offset[..., None] * share, bounds)
        yield log_posterior.exp()


@dataclass(frozen=True)
class Goals:
    """What proposed settings are to do.

    ``on_by``: the share of the steps, in 0 .. 1, by which at least half of the related images are to have p above 0.5.
    ``below_scale``: what guidance_scale * p / (1 - p) is to stay below in 95 % of the unrelated images.
    ``guidance_scale``: the scale with which the settings will be used.
    """

    on_by: float = 0.8
    below_scale: float = 2.0
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        check(self, "on_by", 0 < self.on_by <= 1, "above 0 and at most 1")
        check(self, "below_scale", self.below_scale > 0, "above 0")
        check(self, "guidance_scale", self.guidance_scale > 0, "above 0")


@dataclass(frozen=True)
class Proposal:
    """Settings, and what they would have done along the recorded run.

    ``peak``: how high the evidence of a clear related image rises, in nats (the quantile UPPER). ``related``,
    ``images``: how many images show the concept, and how many there are. ``on_at``: the share of the steps after which
    half of the related images are on; infinite if never.
    ``unrelated_scale``: what the scale stays below in 95 % of the unrelated images; None if there are none.
    """

    settings: Settings
    peak: float
    related: int
    images: int
    on_at: float
    unrelated_scale: float | None

    def meets(self, goals: Goals) -> bool:
        quiet = self.unrelated_scale is None or self.unrelated_scale < goals.below_scale
        return quiet and self.on_at <= goals.on_by


def propose(related: Evidence, unrelated: Evidence | None = None, goals: Goals | None = None) -> Proposal:
    """The settings nearest to the exact ones that meet the goals along the recorded run.

    The exact ones follow from the evidence alone. With an exact model p(c-|x) = prior * exp(evidence) reaches 1 on an
    image that clearly shows the concept, so its evidence peaks at log(1 / prior): temperature 1, offset 0, and the
    prior exp(-evidence). Where that would be a prior below 1 %, the evidence is errors added up over many elements:
    the prior is 1 %, and the temperature such that the posterior again just reaches 1. From there a grid of priors,
    temperatures and offsets is searched; distance is |log(prior ratio)| + |log(temperature ratio)| + offset, all in
    nats.

    Parameters
    ----------
    related: of a concept that some of the images show.
    unrelated: of one that none shows; None lets the images that do not show the related concept stand in for it.

    Raises
    ------
    ValueError: if the evidence is not finite, or no image shows the related concept.
    """
    goals = goals or Goals()
    for evidence in (related, unrelated):
        if evidence is not None and not bool(evidence.increments.isfinite().all()):
            raise ValueError("the run gave NaN or infinite values, so that there is nothing to calibrate on")
    peaks = related.peak
    if float(peaks.max()) < LEAST_EVIDENCE:
        raise ValueError(
            f"none of the {len(peaks)} images shows the related concept: let the positive prompt ask for it, or draw "
            "more images"
        )
    shown = peaks > CLEAR * float(peaks.quantile(TOP))
    peak = float(peaks[shown].quantile(UPPER))
    prior = min(max(math.exp(-peak), SMALLEST_PRIOR), LARGEST_PRIOR)
    temperature = min(1.0, -math.log(prior) / peak)

    base = Settings(guidance_scale=goals.guidance_scale, prior=prior, offset_form="total")
    priors, temperatures, offsets = torch.meshgrid(
        torch.tensor(
            [prior * f for f in PRIOR_FACTORS if base.p_min < prior * f <= LARGEST_PRIOR], dtype=torch.float64
        ),
        torch.tensor([temperature * f for f in TEMPERATURE_FACTORS], dtype=torch.float64),
        torch.tensor(OFFSETS, dtype=torch.float64),
        indexing="ij",
    )
    priors, temperatures, offsets = (grid.flatten() for grid in (priors, temperatures, offsets))
    distance = (priors / prior).log().abs() + (temperatures / temperature).log().abs() + offsets

    grid = (priors, temperatures, offsets, base)
    first_on, largest = _outcome(related, *grid)
    on_at = _quantile(first_on[:, shown], TYPICAL)
    others = _outcome(unrelated, *grid)[1] if unrelated is not None else largest[:, ~shown]
    quiet = _quantile(goals.guidance_scale * others / (1 - others), NEARLY_ALL) if others.shape[1] else None

    missed = (on_at.clamp(max=2) - goals.on_by).clamp(min=0)
    if quiet is not None:
        missed = missed + (quiet / goals.below_scale).log().clamp(min=0)
        missed = missed + torch.where(quiet >= goals.below_scale, 1e-9, 0.0)
    best = int(torch.argmin(torch.where(missed > 0, 1e6 * (1 + missed), distance)))
    return Proposal(
        base.with_(
            prior=round(float(priors[best]), 3),
            temperature=round(float(temperatures[best]), 3),
            offset=float(offsets[best]),
        ),
        peak,
        int(shown.sum()),
        len(shown),
        float(on_at[best]),
        None if quiet is None else float(quiet[best]),
    )


def _outcome(evidence: Evidence, *settings: Any) -> tuple[Tensor, Tensor]:
    """(n, batch) each: the share of the steps by which an image is on (infinite if never), and its largest p."""
    steps = len(evidence.increments) + 1
    first_on = largest = torch.empty(0)
    for step, posterior in enumerate(replay(evidence, *settings), start=1):
        if step == 1:
            first_on, largest = torch.full_like(posterior, math.inf), posterior
        first_on = torch.where((posterior > LIKELY) & first_on.isinf(), step / steps, first_on)
        largest = torch.maximum(largest, posterior)
    return first_on, largest


def _quantile(values: Tensor, q: float) -> Tensor:
    """(n,) of (n, batch): the smallest value that a share ``q`` of the batch does not exceed."""
    return values.sort(dim=1).values[:, math.ceil(q * values.shape[1]) - 1]


def explanation(proposal: Proposal, goals: Goals) -> str:
    """The proposal in Markdown: what was measured, what follows, and whether the goals are met."""
    s = proposal.settings
    exact = math.exp(-proposal.peak)
    lines = [
        f"**Proposed**: prior {s.prior:g}, temperature {s.temperature:g}, offset {s.offset:g} (offset_form total), at "
        f"guidance_scale {s.guidance_scale:g}.",
        "",
        f"- {proposal.related} of {proposal.images} images show the related concept. Their evidence "
        f"peaks at {proposal.peak:.3g} nats.",
    ]
    if exact >= SMALLEST_PRIOR:
        lines.append(
            f"- Evidence of that size is what an exact model gives for a concept with a share of {exact:.2g}: "
            "temperature 1 can be trusted."
        )
    else:
        lines.append(
            f"- That is more than the {-math.log(SMALLEST_PRIOR):.2g} nats of a concept with a share of "
            f"{SMALLEST_PRIOR:g}: errors add up over many elements, so a temperature near "
            f"{-math.log(SMALLEST_PRIOR) / proposal.peak:.2g} brings it back to size."
        )
    if math.isfinite(proposal.on_at):
        lines.append(f"- Half of the related images have p above {LIKELY:g} by {proposal.on_at:.0%} of the steps.")
    else:
        lines.append(f"- Fewer than half of the related images ever have p above {LIKELY:g}.")
    if proposal.unrelated_scale is not None:
        lines.append(
            f"- In {NEARLY_ALL:.0%} of the unrelated images the scale stays below {proposal.unrelated_scale:.2g}."
        )
    verdict = (
        "Both goals are met"
        if proposal.meets(goals)
        else "No settings on the grid meet both goals; these come nearest"
    )
    lines += ["", f"{verdict}: on by {goals.on_by:.0%} of the steps, unrelated below {goals.below_scale:g}."]
    return "\n".join(lines)
