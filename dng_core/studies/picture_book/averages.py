"""Measures of several cases as one row: their means, with intervals."""

import math
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

from ..metrics import wilson_interval

Row = dict[str, Any]
PLAIN = ("kept", "balance", "late_scale", "evaluations", "seconds")
BOOTSTRAPPED = ("rms", "relabelled", "distance")


def averaged(rows: Sequence[Row]) -> Row:
    """The means of what was measured, over cases with the same number of pictures; None where nothing was.

    The interval of left is Wilson's, of all pictures together. For the measures with bootstrap intervals, the middles
    of the cases' intervals are averaged, and their half-widths added in quadrature and divided by the number of cases.
    Cases count as given: the intervals say how far other pictures of the same cases would differ, not other cases.
    They are those of independent cases, though all cases start from the same noise.
    """
    images = sum(row["images"] for row in rows)
    low, high = wilson_interval(sum(round(row["left"] * row["images"]) for row in rows), images)
    means: Row = {"left": mean(row["left"] for row in rows), "left_low": low, "left_high": high}
    for name in (*PLAIN, *BOOTSTRAPPED):
        means[name] = mean_of(row[name] for row in rows)
    for name in BOOTSTRAPPED:
        bounds = [(row[f"{name}_low"], row[f"{name}_high"]) for row in rows if row[f"{name}_low"] is not None]
        means[f"{name}_low"], means[f"{name}_high"] = _together(bounds) if bounds else (None, None)
    return means


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of what was measured."""
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _together(bounds: Sequence[tuple[float, float]]) -> tuple[float, float]:
    middle = mean((low + high) / 2 for low, high in bounds)
    half = math.sqrt(sum(((high - low) / 2) ** 2 for low, high in bounds)) / len(bounds)
    return max(0.0, middle - half), middle + half
