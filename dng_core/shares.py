"""How often a calibrated model draws a concept, and what guidance away from it would do, from one unguided run."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from .calibration import FIT, Calibration, Evidence, stacked, track
from .guidance import dynamic_scales
from .settings import Settings

SHARE_GUESS = 0.5
"""The first guess of a share. A concept that more images show is better put into the prompt than avoided."""

LIKELY = 0.5
"""An image is called pushed where p is above this: the push is then above guidance_scale."""

UNDECIDED = 0.8
"""Where more than this is undecided, a share is little more than its guess: a choice. The MNIST network's digits are
below 0.3."""

Z_95 = 1.96
"""The 97.5 % point of the normal distribution."""


@dataclass(frozen=True)
class Share:
    """How often a model draws a concept.

    ``mean``: the mean of the decided posteriors. ``low``, ``high``: its Wilson interval (95 %), as if each image had
    been told apart for certain. ``images``: how many were drawn. ``undecided``: the mean of p (1 - p), as a share of
    its first value: 0 where all images are told apart, 1 where none is.
    """

    mean: float
    low: float
    high: float
    images: int
    undecided: float

    @property
    def seen(self) -> bool:
        """Whether the images show the concept: their posteriors add up to more than half an image."""
        return self.mean * self.images > 0.5

    @property
    def told_apart(self) -> bool:
        """Whether the model tells images with the concept from images without."""
        return self.undecided < UNDECIDED

    @property
    def verdict(self) -> Literal["seen", "not seen", "cannot tell"]:
        """What is to be said of the concept. The mean says nothing where the model cannot tell."""
        return "cannot tell" if not self.told_apart else "seen" if self.seen else "not seen"

    def prior(self, least: float) -> float:
        """The prior to guide by: the share, and at least ``least``, by which guidance stays off.

        Where the model cannot tell, it is the default prior, by which all images are pushed about alike: what the
        posterior does not show may be there all the same.
        """
        return max(self.mean, least) if self.told_apart else Settings.prior


def share_of(evidence: Evidence, calibration: Calibration) -> Share:
    """The share of images that show a concept, from one unguided run of a calibrated model.

    A prior below the share stays where it is (the mean of p is a martingale's), while one above it comes down, since p
    cannot exceed 1. So the first guess is high, and what it comes down to is the second guess.
    """
    stacked([evidence])  # refuses what is not finite
    images = evidence.increments.shape[1]
    decided = calibration.decided_step(evidence.sigmas)
    settings, mean, p = calibration.applied(FIT), SHARE_GUESS, torch.empty(0)
    for _ in range(2):
        prior = min(max(mean, 1 / (2 * images)), SHARE_GUESS)
        p = track(evidence, settings.with_(prior=prior))[decided]
        mean = float(p.mean())
    spread = Z_95 * math.sqrt(mean * (1 - mean) / images + (Z_95 / (2 * images)) ** 2)
    centre, whole = mean + Z_95**2 / (2 * images), 1 + Z_95**2 / images
    undecided = float((p * (1 - p)).mean()) / (SHARE_GUESS * (1 - SHARE_GUESS))
    return Share(mean, max(0.0, (centre - spread) / whole), min(1.0, (centre + spread) / whole), images, undecided)


@dataclass(frozen=True)
class Outlook:
    """What settings would do along a recorded run, before their own push has changed it.

    ``pushed``: how many of the ``images`` have a posterior above LIKELY at some step. ``scale``: the median of the
    largest guidance scales of these. ``on_at``: the median share of the steps after which they are pushed. ``others``:
    what the guidance scale of 95 % of the other images stays below. Each is None where there is no such image.
    """

    images: int
    pushed: int
    scale: float | None
    on_at: float | None
    others: float | None


def outlook(evidence: Evidence, settings: Settings) -> Outlook:
    """What ``settings`` would do along the run that ``evidence`` recorded."""
    course = track(evidence, settings)
    scales = dynamic_scales([course.log()], [settings], evidence.sigmas)[0].amax(dim=0)
    on = course > LIKELY
    pushed = on.any(dim=0)
    first = on.double().argmax(dim=0).double() / (len(course) - 1)
    return Outlook(
        images=len(pushed),
        pushed=int(pushed.sum()),
        scale=float(scales[pushed].median()) if bool(pushed.any()) else None,
        on_at=float(first[pushed].median()) if bool(pushed.any()) else None,
        others=float(scales[~pushed].quantile(0.95)) if bool((~pushed).any()) else None,
    )


def share_explained(share: Share, seen: Outlook, settings: Settings) -> str:
    """What was found of one concept, and what to expect of ``settings``, in Markdown."""
    if share.verdict == "cannot tell":
        lines = [
            "**The model cannot tell** images that show this from images that do not: the posterior hardly moves from "
            f"its first value. The prior is the default, {settings.prior:.2g}, by which guidance pushes all images "
            "about alike. Name it in other words, or encode it with Joint Negative."
        ]
    elif share.verdict == "not seen":
        lines = [
            f"**Not seen** in {share.images} images: at most {share.high:.0%} show it. The prior is "
            f"{settings.prior:.2g}, so that guidance stays off."
        ]
    else:
        lines = [
            f"**{share.mean:.0%} of the images show it** (between {share.low:.0%} and {share.high:.0%}, by "
            f"{share.images} images). This is the prior."
        ]
    lines.append("")
    lines.append(f"- At guidance_scale {settings.guidance_scale:g}, {seen.pushed} of {seen.images} images are pushed.")
    if seen.scale is not None and seen.on_at is not None:
        lines.append(f"- Half of these are pushed by {seen.on_at:.0%} of the steps, and by up to {seen.scale:.2g}.")
    if seen.others is not None:
        lines.append(f"- In 95 % of the other images the push stays below {seen.others:.2g}.")
    return "\n".join(lines)
