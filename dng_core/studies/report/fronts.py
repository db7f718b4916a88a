"""Points with error bars and labels, from which Pareto plots are made; by matplotlib."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes


class FrontPoint(NamedTuple):
    """A point of a plot: its place, how far the bars reach (down, up) along each axis, and the text beside it."""

    x: float
    y: float
    across: tuple[float, float]
    along: tuple[float, float]
    label: str


def bars(interval: tuple[float | None, float | None], value: float | None, factor: float) -> tuple[float, float]:
    """How far an interval reaches below and above a value, each times ``factor`` and at least 0; 0 if unknown."""
    low, high = interval
    if low is None or high is None or value is None:
        return 0.0, 0.0
    return max(0.0, factor * (value - low)), max(0.0, factor * (high - value))


def draw_points(
    axes: Axes, points: Sequence[FrontPoint], colour: str, marker: str, name: str | None, size: float = 6.0
) -> None:
    """Draw one method's points; ``name`` is what the legend calls them."""
    axes.errorbar(
        [point.x for point in points], [point.y for point in points], xerr=np.array([p.across for p in points]).T,
        yerr=np.array([p.along for p in points]).T, color=colour, marker=marker, label=name, linestyle="none",
        elinewidth=0.6, markersize=size,
    )  # fmt: skip
    for point in points:
        if point.label:
            place = (point.x, point.y)
            axes.annotate(point.label, place, textcoords="offset points", xytext=(5, 4), fontsize=7)
