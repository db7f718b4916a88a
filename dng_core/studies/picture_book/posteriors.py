"""Whether the picture book's posteriors know what its pictures show, by the judge, who looks at the same pictures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...calibration import EXACT, FIT, Calibration, Evidence, track
from ...models.predictors import Precision
from ...shares import share_of
from ..evidence_figures import roc_area
from ..samplers import SAMPLERS, Sampler
from .cases import CASES, Case
from .measures import Seen
from .methods import METHODS, unguided
from .opened import OpenedBook, open_book
from .sampling import pictures_of

CFGS = (1.0, 3.0, 5.0, 7.5)
BASE: tuple[float, Sampler, int] = (1.0, "euler_ancestral", 30)  # where the shipped calibration was measured
OTHER_STEPS = (20, 50)
OPEN_SHARE = 0.05  # a case says something of posteriors where the thing is there and not there in so many pictures
METHOD = METHODS["dng_joint"]


@torch.no_grad()
def carry_over_figure(
    weights: Path | None, images: int, seed: int, precision: Precision = "float32"
) -> Iterator[dict[str, Any]]:
    """One row per cfg, sampler and step count, each changed from those of the calibration alone.

    In every row are the related cases of one thing that at least 5 % of the pictures show, and 5 % do not. The scores
    are means over the cases. *cross entropy*: of p against the judge's verdict, in nats, at the level at which the
    calibration calls pictures decided, with the true share as the prior: of that share alone, by exact settings, and
    by the calibration. *ROC area*: how often p of a picture with the thing is above that of one without.
    """
    opened = open_book(weights, precision)
    cfg, sampler, steps = BASE
    settings = [(other, sampler, steps) for other in CFGS]
    settings += [(cfg, other, steps) for other in SAMPLERS if other != sampler]
    settings += [(cfg, sampler, other) for other in OTHER_STEPS]
    for setting in settings:
        found = []
        for case in CASES:
            if case.kind == "related" and len(case.avoid) == 1:
                evidence, shown = _recorded(opened, case, *setting, images, seed)
                if OPEN_SHARE <= float(shown.double().mean()) <= 1 - OPEN_SHARE:
                    found.append(_scores(evidence, shown, opened.calibration))
        row = {"cfg": setting[0], "sampler": setting[1], "steps": setting[2], "precision": precision}
        names = ("share alone", "exact", "calibrated", "ROC area, exact", "ROC area, calibrated")
        means = [sum(scores) / len(found) for scores in zip(*found, strict=True)] or [None] * len(names)
        yield row | {"cases": len(found)} | dict(zip(names, means, strict=True))


@torch.no_grad()
def shares_figure(weights: Path | None, images: int, steps: int, seed: int, cfg: float) -> Iterator[dict[str, Any]]:
    """One row per case of one thing: its share by the judge, and what Calibrate says of it from the same pictures."""
    opened = open_book(weights)
    for case in CASES:
        if case.kind != "absurd" and len(case.avoid) == 1:
            evidence, shown = _recorded(opened, case, cfg, "euler_ancestral", steps, images, seed)
            share = share_of(evidence, opened.calibration)
            row = {"kind": case.kind, "case": case.name, "judged": float(shown.double().mean()), "said": share.verdict}
            yield row | {"share": share.mean, "low": share.low, "high": share.high, "undecided": share.undecided}


def _recorded(
    opened: OpenedBook, case: Case, cfg: float, sampler: Sampler, steps: int, images: int, seed: int
) -> tuple[Evidence, Tensor]:
    """The evidence of unguided pictures for a case's thing, and which of them show it, (n,) bool."""
    told = (case, METHOD, cfg, sampler, steps, images, seed)
    evidence, latents = unguided(opened.book, opened.chain, *told)
    return evidence, Seen.by(opened.judge, pictures_of(latents)).shows_any(case.avoid)


def _scores(evidence: Evidence, shown: Tensor, calibration: Calibration) -> tuple[float, ...]:
    share = float(shown.double().mean())
    alone = _cross_entropy(torch.full(shown.shape, share), shown)
    decided = calibration.decided_step(evidence.sigmas)
    ends = [track(evidence, c.applied(FIT.with_(prior=share)))[decided] for c in (EXACT, calibration)]
    return alone, *(_cross_entropy(p, shown) for p in ends), *(roc_area(p[None], shown[None]) for p in ends)


def _cross_entropy(p: Tensor, shown: Tensor) -> float:
    return -float(torch.where(shown, p.log(), torch.log1p(-p)).mean())
