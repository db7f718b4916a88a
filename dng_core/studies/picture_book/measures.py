"""What is measured of the pictures of one case: what is left of the thing, and what else changed."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...models.picture_book.judge import Judge, Verdict
from ..features import Gaussian, frechet_distance
from ..measuring import FEATURE_RESAMPLES, HISTOGRAM_RESAMPLES
from ..metrics import bootstrap_interval, wilson_interval
from .cases import LABELS, Case


@dataclass(frozen=True)
class Seen:
    """Pictures, (n, 3, 64, 64) in -1 .. 1, with what the judge sees in them: labels (n, labels) bool, and features."""

    pictures: Tensor
    labels: Tensor
    features: Tensor

    @classmethod
    def by(cls, judge: Judge, pictures: Tensor) -> "Seen":
        verdict: Verdict = judge.look(pictures)
        with torch.no_grad():
            features = torch.cat([judge.features(part) for part in pictures.split(250)])
        return cls(pictures, torch.stack([verdict.shows(name) for name in LABELS], dim=1), features)

    def shows_any(self, names: tuple[str, ...]) -> Tensor:
        """Whether each picture shows one of the labels, (n,) bool."""
        return self.labels[:, [LABELS.index(name) for name in names]].any(dim=1)


def measure(case: Case, seen: Seen, without: Seen, other: Seen) -> dict[str, Any]:
    """The measures of a case's pictures beside those without guidance from the same noise.

    - left: the share that shows the thing; was: without guidance.
    - kept, kept_was: the share of the labels that the prompt asks for, over all pictures, with and without guidance.
    - rms: the root mean square of the change of the pictures that never showed the thing (pixels 0 to 1);
      relabelled: the share of their labels that changed. None where every picture showed it.
    - balance: the mean absolute difference, over all other labels, between their shares and those among the pictures
      of another seed without guidance that do not show the thing.
    - distance: the Frechet distance to these pictures in the judge's features; None where there are less than two.

    With NAME_low and NAME_high, the 95 % intervals: Wilson's of left, and basic bootstrap intervals of rms, relabelled
    and distance; None for less than two pictures.

    ``other``: pictures of the case without guidance from another seed.
    """
    shown, never = seen.shows_any(case.avoid), ~without.shows_any(case.avoid)
    low, high = wilson_interval(int(shown.sum()), len(shown))
    asked = [LABELS.index(name) for name in case.asked]
    rest = [i for i, name in enumerate(LABELS) if name not in case.avoid]
    change = ((seen.pictures[never] - without.pictures[never]) / 2).flatten(1).square().mean(dim=1).double().numpy()
    changed = (seen.labels != without.labels)[never].double().mean(dim=1).numpy()
    like = ~other.shows_any(case.avoid)
    comparable = int(like.sum()) >= 2
    shares = seen.labels[:, rest].double().mean(dim=0)
    measures = {
        "left": mean(shown),
        "left_low": low,
        "left_high": high,
        "was": mean(~never),
        "kept": mean(seen.labels[:, asked]),
        "kept_was": mean(without.labels[:, asked]),
        "balance": mean((shares - other.labels[like][:, rest].double().mean(dim=0)).abs()) if comparable else None,
    }
    measures |= _with_interval("rms", lambda index: math.sqrt(change[index].mean()), len(change), HISTOGRAM_RESAMPLES)
    measures |= _with_interval("relabelled", lambda i: float(changed[i].mean()), len(changed), HISTOGRAM_RESAMPLES)
    against = Gaussian.of(other.features[like]) if comparable else None

    def distance(index: np.ndarray) -> float:
        assert against is not None
        return frechet_distance(Gaussian.of(seen.features[torch.from_numpy(index)]), against)

    return measures | _with_interval("distance", distance, len(shown) if comparable else 0, FEATURE_RESAMPLES)


def _with_interval(
    name: str, statistic: Callable[[np.ndarray], float], count: int, resamples: int
) -> dict[str, float | None]:
    """A statistic of ``count`` pictures, which is never negative, and its bootstrap interval, cut off at 0."""
    value = statistic(np.arange(count)) if count else None
    bounds = bootstrap_interval(statistic, count, resamples) if count > 1 else None
    low, high = (None, None) if bounds is None else (max(0.0, bound) for bound in bounds)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def mean(values: Tensor) -> float | None:
    """The mean as a number; None for no values."""
    return float(values.double().mean()) if values.numel() else None
