"""The trace of a guided run as a chart: posterior and guidance scale over the steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image

from ..guidance import Trace
from .drawing import Box, Colour, Drawing, ThemeName, fitted, log_ticks, text_width, ticks

Axis = Literal["step", "sigma", "log-SNR"]
View = Literal["auto", "lines", "quantiles"]
AXES: tuple[Axis, ...] = get_args(Axis)
VIEWS: tuple[View, ...] = get_args(View)

MOST_LINES = 8  # a choice: colours cannot tell more images apart, so "auto" then shows quantiles
FEW_STEPS = 30  # a choice: up to this number of steps, every step has a dot
DASHES: tuple[float | None, ...] = (None, 9.0, 3.0)  # of the first, second and every further concept
BANDS = ((0.05, 0.95, 0.16), (0.25, 0.75, 0.26))  # quantiles and opacity: a choice; several concepts: inner one only
LIKELY = 0.5  # a choice: the summary counts the images whose posterior exceeds this


@dataclass(frozen=True)
class Horizontal:
    """A horizontal axis: the place of each step, the range, the marks with their text, and the axis's name."""

    places: np.ndarray
    low: float
    high: float
    marks: list[tuple[float, str]]
    name: str


@dataclass(frozen=True)
class Vertical:
    """A vertical axis from 0 to ``high``."""

    high: float
    marks: list[tuple[float, str]]


def trace_chart(
    trace: Trace | None,
    axis: Axis = "step",
    view: View = "auto",
    theme: ThemeName = "light",
    width: int = 960,
    height: int = 720,
) -> Image.Image:
    """Posterior (above) and guidance scale (below) of every image and concept over the steps of a run.

    A tick below a panel marks a step at which no undesired prediction was evaluated.

    Parameters
    ----------
    trace: None, or one without steps, gives a picture that says so.
    axis: what the steps are drawn against. log-SNR is -2 ln sigma, which grows as the image gets clearer.
    view: "lines" draws one per image and concept; "quantiles" draws the median, with bands over the images; "auto"
        draws lines for up to 8 images.

    Raises
    ------
    ValueError: if the trace holds NaN.
    """
    drawing = Drawing(width, height, theme)
    size = max(10, round(min(width / 42, height / 31)))
    if trace is None or not len(trace.sigmas):
        text = "Nothing was tracked: guidance was off, or its method is not dng."
        drawing.text((width / 2, height / 2), fitted(text, size, width), size, drawing.theme.muted, "mm")
        return drawing.finished()
    posterior, scale = as_array(trace.posterior, "posterior"), as_array(trace.scale, "scale")
    concepts, images = posterior.shape[1:]

    margin = size
    held = np.zeros(len(posterior), bool) if trace.looked is None else ~np.asarray(trace.looked).any(axis=1)
    drawing.text((margin, 0.6 * size), fitted(_summary(posterior, int(held.sum())), size, width - 2 * margin), size)
    lines = view == "lines" or (view == "auto" and images <= MOST_LINES)
    entries = _legend(drawing, concepts, images, lines)
    top = _draw_legend(drawing, entries, 2.2 * size, margin, width - margin, size)

    horizontal = horizontal_axis(trace.sigmas.tolist(), axis, at_most=max(2, int(width / (5.5 * size))))
    left, right = 4.2 * size, width - 1.6 * size
    bottom, gap = height - 3.6 * size, 2.4 * size
    middle = (top + bottom) / 2
    panels = (
        ("posterior p", posterior, share_axis(), (left, top + 1.7 * size, right, middle - gap / 3)),
        ("guidance scale", scale, scale_axis(scale, height / size), (left, middle + 1.7 * size, right, bottom)),
    )
    for name, values, vertical, box in panels:
        drawing.text((left, box[1] - 0.5 * size), name, size, drawing.theme.ink, "ls")
        draw_axes(drawing, box, horizontal, vertical, size, labels=box[3] == bottom)
        if lines:
            _draw_lines(drawing, box, horizontal, vertical, values, size)
        else:
            _draw_quantiles(drawing, box, horizontal, vertical, values, size)
        across, _ = _mapping(box, horizontal, vertical)
        for x in map(across, horizontal.places[held]):  # the last difference was held there
            drawing.line([(x, box[3]), (x, box[3] + 0.4 * size)], drawing.theme.muted, size / 9)
    drawing.text(((left + right) / 2, height - 0.6 * size), horizontal.name, size, drawing.theme.muted, "ms")
    return drawing.finished()


def horizontal_axis(sigmas: Sequence[float], axis: Axis, at_most: int) -> Horizontal:
    """The horizontal axis for VE noise levels that fall; sigma is drawn on a logarithmic scale, from high to low."""
    if axis == "step":
        count = len(sigmas)
        places = np.arange(1.0, count + 1)
        marks = [(m, f"{m:g}") for m in ticks(0, count, at_most) if m == round(m) and m >= 1]
        if not marks or (marks[0][0] > 1 and marks[0][0] - 1 > 0.6 * count / at_most):
            marks = [(1.0, "1"), *marks]
        low, high = (0.5, 1.5) if count == 1 else (1.0, float(count))
        return Horizontal(places, low, high, marks, "step")
    clearness = -_log_levels(sigmas)
    low, high = float(clearness.min()), float(clearness.max())
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    if axis == "sigma":
        marks = [(-math.log(m), f"{m:g}") for m in log_ticks(math.exp(-high), math.exp(-low), at_most)]
        return Horizontal(clearness, low, high, marks, "noise level sigma")
    marks = [(m / 2, f"{m:g}") for m in ticks(2 * low, 2 * high, at_most)]
    return Horizontal(clearness, low, high, marks, "log-SNR")


def share_axis() -> Vertical:
    return Vertical(1.0, [(0.0, "0"), (0.25, ""), (0.5, "0.5"), (0.75, ""), (1.0, "1")])


def scale_axis(scale: np.ndarray, lines: float) -> Vertical:
    """From 0 to just above the largest scale; ``lines``: the picture's height in lines of text."""
    largest = float(scale.max())
    high = 1.05 * largest if largest > 1e-9 else 1.0
    return Vertical(high, [(m, f"{m:g}") for m in ticks(0.0, high, 6 if lines > 24 else 4)])


def draw_axes(
    drawing: Drawing, box: Box, horizontal: Horizontal, vertical: Vertical, size: int, labels: bool = True
) -> None:
    """Grid lines and their numbers in and around a panel."""
    left, top, right, bottom = box
    across, down = _mapping(box, horizontal, vertical)
    faint, muted = drawing.theme.faint, drawing.theme.muted
    small = max(9, round(0.86 * size))
    for value, text in vertical.marks:
        drawing.line([(left, down(value)), (right, down(value))], faint, size / 18)
        drawing.text((left - 0.5 * size, down(value)), text, small, muted, "rm")
    for value, text in horizontal.marks:
        drawing.line([(across(value), top), (across(value), bottom)], faint, size / 18)
        if labels:
            drawing.text((across(value), bottom + 0.45 * size), text, small, muted, "ma")
    drawing.line([(left, bottom), (right, bottom)], muted, size / 12)


def draw_series(
    drawing: Drawing,
    box: Box,
    horizontal: Horizontal,
    vertical: Vertical,
    values: np.ndarray,
    colour: Colour,
    width: float,
    dash: float | None = None,
) -> None:
    """One line, (steps,) values, with a dot at each step where steps are few."""
    across, down = _mapping(box, horizontal, vertical)
    points = [(across(x), down(y)) for x, y in zip(horizontal.places, values, strict=True)]
    drawing.line(points, colour, width, dash)
    if len(points) <= FEW_STEPS:
        for point in points:
            drawing.dot(point, (1.3 if len(points) > 1 else 2.0) * width, colour)


def _draw_lines(
    drawing: Drawing, box: Box, horizontal: Horizontal, vertical: Vertical, values: np.ndarray, size: int
) -> None:
    concepts, images = values.shape[1:]
    for concept in reversed(range(concepts)):
        for image in reversed(range(images)):
            colour, dash = _line_style(drawing, concept, image, concepts, images)
            width = size / 8 if images <= MOST_LINES else size / 16
            draw_series(
                drawing,
                box,
                horizontal,
                vertical,
                values[:, concept, image],
                colour,
                width,
                None if dash is None else dash * size / 12,
            )


def _draw_quantiles(
    drawing: Drawing, box: Box, horizontal: Horizontal, vertical: Vertical, values: np.ndarray, size: int
) -> None:
    across, down = _mapping(box, horizontal, vertical)
    xs = [across(x) for x in horizontal.places]
    if len(xs) == 1:  # one step has no extent: give its bands the width of a bar
        xs = [xs[0] - size, xs[0] + size]
        values = np.repeat(values, 2, axis=0)
        horizontal = Horizontal(np.array([0.5, 1.5]), horizontal.low, horizontal.high, [], horizontal.name)
    concepts = values.shape[1]
    for concept in reversed(range(concepts)):
        colour = drawing.theme.series[concept % len(drawing.theme.series)]
        for low, high, opacity in _bands(concepts):
            lower, upper = np.quantile(values[:, concept], (low, high), axis=1)
            outline = [*zip(xs, map(down, upper), strict=True), *zip(xs[::-1], map(down, lower[::-1]), strict=True)]
            drawing.area([(x, float(y)) for x, y in outline], colour, opacity)
    for concept in reversed(range(concepts)):
        colour = drawing.theme.series[concept % len(drawing.theme.series)]
        for line, width, dash in (
            (values[:, concept].max(axis=1), size / 14, size / 4),
            (np.median(values[:, concept], axis=1), size / 7, None),
        ):
            drawing.line([(x, down(y)) for x, y in zip(xs, line, strict=True)], colour, width, dash)


def _mapping(
    box: Box, horizontal: Horizontal, vertical: Vertical
) -> tuple[Callable[[float], float], Callable[[float], float]]:
    left, top, right, bottom = box

    def across(value: float) -> float:
        return left + (right - left) * (float(value) - horizontal.low) / (horizontal.high - horizontal.low)

    def down(value: float) -> float:
        return bottom - (bottom - top) * float(value) / vertical.high

    return across, down


def _line_style(drawing: Drawing, concept: int, image: int, concepts: int, images: int) -> tuple[Colour, float | None]:
    """Colours tell images apart, and dashes concepts. With one image, or too many, colours tell concepts apart."""
    series = drawing.theme.series
    if images == 1 or images > MOST_LINES:
        return series[concept % len(series)], None
    return series[image % len(series)], DASHES[min(concept, len(DASHES) - 1)]


def _legend(
    drawing: Drawing, concepts: int, images: int, lines: bool
) -> list[tuple[str, Colour, float | None, float, float]]:
    """Label, colour, dash, width (in text sizes) and opacity of each sample line."""
    ink, series = drawing.theme.ink, drawing.theme.series
    entries: list[tuple[str, Colour, float | None, float, float]] = []
    if concepts > 1 and (not lines or images == 1 or images > MOST_LINES):
        entries += [(f"concept {i + 1}", series[i % len(series)], None, 1 / 7, 1.0) for i in range(concepts)]
    if not lines:
        shade = ink if concepts > 1 else series[0]
        entries.append(("median", shade, None, 1 / 7, 1.0))
        for low, high, opacity in reversed(_bands(concepts)):
            shown = opacity + (BANDS[0][2] if concepts == 1 and low > BANDS[0][0] else 0)
            entries.append((f"{100 * low:g} to {100 * high:g} %", shade, None, 0.75, shown))
        entries.append(("largest", shade, 1 / 4, 1 / 14, 1.0))
    elif 1 < images <= MOST_LINES:
        entries += [(f"image {i + 1}", series[i % len(series)], None, 1 / 7, 1.0) for i in range(images)]
        if concepts > 1:
            dashes = [DASHES[min(i, len(DASHES) - 1)] for i in range(concepts)]
            entries += [
                (f"concept {i + 1}", ink, None if d is None else d / 12, 1 / 8, 1.0) for i, d in enumerate(dashes)
            ]
    return entries


def _bands(concepts: int) -> tuple[tuple[float, float, float], ...]:
    return BANDS if concepts == 1 else BANDS[1:]


def _draw_legend(
    drawing: Drawing,
    entries: list[tuple[str, Colour, float | None, float, float]],
    top: float,
    left: float,
    right: float,
    size: int,
) -> float:
    """Samples with their labels in as many rows as they need; returns where they end."""
    if not entries:
        return top - 0.4 * size
    small, sample, x, y = max(9, round(0.9 * size)), 1.8 * size, left, top + 0.5 * size
    for label, colour, dash, width, opacity in entries:
        length = sample + 0.4 * size + text_width(label, small)
        if x > left and x + length > right:
            x, y = left, y + 1.5 * size
        if opacity < 1:
            half = width * size / 2
            corners = [(x, y - half), (x + sample, y - half), (x + sample, y + half), (x, y + half)]
            drawing.area(corners, colour, opacity)
        else:
            drawing.line([(x, y), (x + sample, y)], colour, width * size, None if dash is None else dash * size)
        drawing.text((x + sample + 0.4 * size, y), label, small, anchor="lm")
        x += length + 1.2 * size
    return y + 0.8 * size


def _summary(posterior: np.ndarray, held: int) -> str:
    steps, concepts, images = posterior.shape
    parts = [_count(images, "image")]
    if concepts > 1:
        parts.append(_count(concepts, "concept"))
    parts.append(_count(steps, "step") + (f" ({held} held)" if held else ""))
    reached = int((posterior.max(axis=(0, 1)) > LIKELY).sum())
    told = f"p above {LIKELY:g} in {reached}" if images > 1 else f"largest p {float(posterior.max()):.2g}"
    return ", ".join(parts) + f" - {told}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def as_array(values: object, name: str) -> np.ndarray:
    """A part of a trace as float64; ValueError if it is not finite."""
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(
            f"the trace's {name} holds NaN or infinite values, so the run that made it failed; run it again"
        )
    return array


def _log_levels(sigmas: Sequence[float]) -> np.ndarray:
    """ln sigma. For a level of infinity or 0 it is not finite; such a level is put one step beyond its neighbour."""
    with np.errstate(divide="ignore"):
        logs = np.log(np.asarray(sigmas, dtype=np.float64))
    finite = np.flatnonzero(np.isfinite(logs))
    if not len(finite):
        return -np.arange(len(logs), dtype=np.float64)
    first, last = finite[0], finite[-1]
    spacing = (logs[first] - logs[last]) / max(1, last - first) or 1.0
    places = np.arange(len(logs))
    logs[:first] = logs[first] + spacing * (first - places[:first])
    logs[last + 1 :] = logs[last] - spacing * (places[last + 1 :] - last)
    return logs
