"""Images without and with guidance, side by side with what changed and why: a sheet, and the numbers as a table."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from PIL import Image

from ..guidance import Trace
from .drawing import THEMES, Box, Drawing, ThemeName, fitted, ramp_colour, text_width
from .trace_chart import as_array, draw_axes, draw_series, horizontal_axis, scale_axis, share_axis

Order = Literal["most changed first", "as drawn"]
ORDERS: tuple[Order, ...] = get_args(Order)

TITLES = ("without", "with guidance", "difference")
ASPECT = 1.5  # width / height of the sheet, as nearly as its cards allow: a choice
LARGEST = 8192**2  # pixels of a sheet: as many as the largest chart of a trace has, which takes some 4 GB to draw
SMALLEST_SCALE = 0.1  # a choice: the difference's colours end here unless a pixel changes more


def rms_changes(without: np.ndarray, with_: np.ndarray) -> np.ndarray:
    """(n,) root mean square of the change of each image; both are (n, height, width, channels) in 0 .. 1."""
    return np.sqrt(np.square(with_ - without).mean(axis=(1, 2, 3)))


def chosen_images(changes: np.ndarray, order: Order, at_most: int) -> list[int]:
    """Which images to show, counted from 0."""
    indices = np.argsort(-changes, kind="stable") if order == "most changed first" else np.arange(len(changes))
    return [int(i) for i in indices[:at_most]]


def comparison_table(changes: np.ndarray, trace: Trace | None) -> str:
    """One Markdown row for each image, and one for all; ``changes``: (n,) from :func:`rms_changes`."""
    traced = trace is not None and len(trace.sigmas) > 0
    lines = [
        "| image | RMS change |" + (" largest p | largest scale |" if traced else ""),
        "| ---: | ---: |" + (" ---: | ---: |" if traced else ""),
    ]
    if trace is not None and traced:
        peaks = as_array(trace.posterior, "posterior").max(axis=(0, 1))
        pushes = as_array(trace.scale, "scale").max(axis=(0, 1))
    for i, change in enumerate(changes):
        lines.append(f"| {i + 1} | {change:.4f} |" + (f" {peaks[i]:.3g} | {pushes[i]:.3g} |" if traced else ""))
    total = f"| all | {_total(changes):.4f} |"
    return "\n".join([*lines, total + (f" {peaks.max():.3g} | {pushes.max():.3g} |" if traced else "")])


def comparison_sheet(
    without: np.ndarray,
    with_: np.ndarray,
    trace: Trace | None = None,
    order: Order = "most changed first",
    at_most: int = 16,
    cell: int = 256,
    theme: ThemeName = "light",
) -> Image.Image:
    """A card for each image: without, with, and the difference (mean over the channels); its trace under them.

    Parameters
    ----------
    without, with_: (n, height, width, 3) in 0 .. 1, of the same seeds.
    trace: of the run with guidance, of n images; None for none.
    cell: the longest side of an image on the sheet in pixels. Small images are enlarged by whole factors.

    Raises
    ------
    ValueError: if the sheet would be of more pixels than :data:`LARGEST`.
    """
    changes = rms_changes(without, with_)
    shown = chosen_images(changes, order, at_most)
    difference = np.abs(with_ - without).mean(axis=3)
    ceiling = max(SMALLEST_SCALE, float(difference[shown].max()))
    traced = trace if trace is not None and len(trace.sigmas) else None

    size = min(26, max(13, round(cell / 13)))
    width, height = _fitted_size(without.shape[2], without.shape[1], cell)
    gap, margin = round(0.4 * size), size
    strip = round(max(6.5 * size, 0.4 * height)) if traced else 0
    card_width, card_height = 3 * width + 2 * gap, round(1.7 * size) + height + strip
    columns = _columns(len(shown), card_width + 2 * margin, card_height + margin)
    rows = math.ceil(len(shown) / columns)
    head = round(4.9 * size)
    full = columns * (card_width + 2 * margin), head + rows * (card_height + margin) + round(0.3 * size)
    if full[0] * full[1] > LARGEST:
        raise ValueError(
            f"a sheet of {len(shown)} images at `image_size` {cell} would be {full[0]}x{full[1]} pixels, more than "
            f"the {LARGEST / 1e6:.0f} million that are drawn; lower `image_size` or `at_most`"
        )
    drawing = Drawing(*full, theme)

    concepts = traced.posterior.shape[1] if traced else 0
    _draw_head(drawing, changes, len(shown), order, ceiling, concepts, size)
    for column in range(columns):
        for i, title in enumerate(TITLES):
            middle = margin + column * (card_width + 2 * margin) + i * (width + gap) + width / 2
            drawing.text((middle, head - 0.3 * size), title, size, drawing.theme.muted, "ms")
    for place, index in enumerate(shown):
        left = margin + place % columns * (card_width + 2 * margin)
        top = head + place // columns * (card_height + margin)
        text = f"image {index + 1}: RMS change {changes[index]:.3f}"
        drawing.text((left, top + 0.75 * size), fitted(text, size, card_width), size, anchor="lm")
        top += round(1.7 * size)
        pictures = (_picture(without[index]), _picture(with_[index]), _heat(difference[index] / ceiling, theme))
        for i, picture in enumerate(pictures):
            drawing.picture(_resized(picture, width, height), left + i * (width + gap), top)
        if traced:
            box = (left, top + height + 0.5 * size, left + card_width, top + height + strip)
            _draw_strip(drawing, box, traced, index, size)
    return drawing.finished()


def _draw_head(
    drawing: Drawing, changes: np.ndarray, shown: int, order: Order, ceiling: float, concepts: int, size: int
) -> None:
    """The summary, and keys to the colours of the difference and of the trace's concepts."""
    margin, width = size, drawing.width - 2 * size
    number = f"{len(changes)} images" if len(changes) > 1 else "1 image"
    told = f"{number}: RMS change {_total(changes):.3f}, pixels 0 to 1"
    if shown < len(changes):
        told += f" - {shown} shown, {order}"
    drawing.text((margin, 0.6 * size), fitted(told, size, width), size)
    low, high = "difference 0", f"{ceiling:.2g}"
    x, y, bar = margin + text_width(low, size) + 0.5 * size, 2.4 * size, 8.0 * size
    drawing.text((margin, y), low, size, drawing.theme.muted, "lm")
    parts = 64
    for i in range(parts):
        left, right = x + bar * i / parts, x + bar * (i + 1) / parts
        drawing.rectangle((left, y - 0.4 * size, right, y + 0.4 * size), ramp_colour(drawing.theme, i / (parts - 1)))
    drawing.text((x + bar + 0.5 * size, y), high, size, drawing.theme.muted, "lm")
    x += bar + 2 * size + text_width(high, size)
    for i in range(concepts if concepts > 1 else 0):
        name = f"concept {i + 1}"
        drawing.line([(x, y), (x + 1.5 * size, y)], drawing.theme.series[i % len(drawing.theme.series)], size / 7)
        drawing.text((x + 1.9 * size, y), name, size, drawing.theme.muted, "lm")
        x += 3 * size + text_width(name, size)


def _draw_strip(drawing: Drawing, box: Box, trace: Trace, image: int, size: int) -> None:
    """One image's posterior (left) and guidance scale (right) over the steps, a line for each concept."""
    posterior, scale = as_array(trace.posterior, "posterior"), as_array(trace.scale, "scale")
    left, top, right, bottom = box
    small = max(10, round(0.75 * size))
    half = (right - left) / 2
    horizontal = horizontal_axis(trace.sigmas.tolist(), "step", at_most=max(2, int(half / (4 * small))))
    panels = (("posterior p", posterior, share_axis()), ("guidance scale", scale, scale_axis(scale, 1)))
    for i, (name, values, vertical) in enumerate(panels):
        start = left + i * half
        inner = (start + 2.6 * small, top + 1.5 * small, start + half - 0.8 * small, bottom - 1.6 * small)
        drawing.text((inner[0], inner[1] - 0.4 * small), name, small, drawing.theme.muted, "ls")
        draw_axes(drawing, inner, horizontal, vertical, small)
        for concept in reversed(range(values.shape[1])):
            colour = drawing.theme.series[concept % len(drawing.theme.series)]
            draw_series(drawing, inner, horizontal, vertical, values[:, concept, image], colour, small / 9)


def _columns(cards: int, width: float, height: float) -> int:
    """How many cards to put side by side for a sheet of nearly the wanted shape."""

    def distance(columns: int) -> float:
        return abs(math.log(columns * width / (math.ceil(cards / columns) * height) / ASPECT))

    return min(range(1, cards + 1), key=distance)


def _fitted_size(width: int, height: int, cell: int) -> tuple[int, int]:
    longest = max(width, height)
    factor = cell // longest if longest <= cell else cell / longest
    return max(1, round(width * factor)), max(1, round(height * factor))


def _resized(picture: Image.Image, width: int, height: int) -> Image.Image:
    grows = width > picture.width
    return picture.resize((width, height), Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS)


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))


def _heat(values: np.ndarray, theme: ThemeName) -> Image.Image:
    """Values in 0 .. 1, (height, width), in the colours of the theme's ramp."""
    table = np.array([ramp_colour(THEMES[theme], i / 255) for i in range(256)], dtype=np.uint8)
    return Image.fromarray(table[(values.clip(0, 1) * 255).round().astype(np.uint8)])


def _total(changes: Sequence[float] | np.ndarray) -> float:
    """The root mean square over all images."""
    return float(np.sqrt(np.square(changes).mean()))
