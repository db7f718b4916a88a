"""Pictures of class removal: a bar chart of the classes' shares, and a sheet of the images."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from .drawing import Colour, Drawing, fitted, text_width

COLOURS: tuple[Colour, ...] = (
    (127, 127, 127),
    (230, 159, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
)
# Okabe and Ito's palette, which colour-blind readers can tell apart; grey for the first method, usually "no guidance"
TINT = (253, 236, 236)  # behind the class that was to be removed
SHEET_CELL = 56  # smallest side of an image on the sheet, in pixels: a choice


def share_bars(
    title: str,
    classes: Sequence[str],
    removed: int,
    methods: Sequence[tuple[str, Sequence[float]]],
    width: int = 960,
    height: int = 480,
) -> Image.Image:
    """Share of each class, one bar per method; the dashed line is an even share of the classes that remain.

    Parameters
    ----------
    methods: for each method, its label and the share of each class in 0 .. 1.
    """
    drawing = Drawing(width, height)
    theme, size, small = drawing.theme, 18, 15
    left, right, bottom = 64.0, width - 20.0, height - 60.0
    drawing.text((left, 10), title, size)
    x, y = left, 53.0
    for i, (label, _) in enumerate(methods):
        length = 20 + text_width(label, small)
        if x > left and x + length > right:
            x, y = left, y + 22
        drawing.rectangle((x, y - 7, x + 14, y + 7), _colour(i))
        drawing.text((x + 20, y), label, small, anchor="lm")
        x += length + 28
    top = y + 31

    even = 1 / (len(classes) - 1)
    largest = max(even, *(max(shares) for _, shares in methods))
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if largest / step <= 8)
    ceiling = step * math.ceil(largest / step + 1e-9)

    def level(share: float) -> float:
        return bottom - (bottom - top) * share / ceiling

    group = (right - left) / len(classes)
    drawing.rectangle((left + removed * group, top, left + (removed + 1) * group, bottom), TINT)
    for i in range(round(ceiling / step) + 1):
        drawing.line([(left, level(i * step)), (right, level(i * step))], theme.faint)
        drawing.text((left - 8, level(i * step)), f"{i * step:.0%}", small, anchor="rm")
    drawing.line([(left, level(even)), (right, level(even))], theme.ink, dash=6)
    bar = 0.8 * group / len(methods)
    for i, (_, shares) in enumerate(methods):
        for c, share in enumerate(shares):
            x = left + c * group + 0.1 * group + i * bar
            if share:
                drawing.rectangle((x, min(level(share), bottom - 1), x + bar - 1, bottom), _colour(i))
    drawing.line([(left, bottom), (right, bottom)], theme.ink, 2)
    for c, name in enumerate(classes):
        colour = theme.alarm if c == removed else theme.ink
        drawing.text((left + (c + 0.5) * group, bottom + 8), name, size, colour, "ma")
    drawing.text(((left + right) / 2, height - 8), "class, as the classifier sees it", small, anchor="ms")
    return drawing.finished()


def image_sheet(panels: Sequence[tuple[str, np.ndarray, Sequence[bool]]]) -> Image.Image:
    """Images of several methods side by side, the same seed in the same place; a red frame marks some.

    Parameters
    ----------
    panels: for each method, its title, its images (n, height, width, 3) uint8, and which of them to frame.
    """
    count = min(len(images) for _, images, _ in panels)
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    side = max(max(images.shape[1:3]) for _, images, _ in panels)
    cell = side * max(1, math.ceil(SHEET_CELL / side))
    gap, margin, head, size = 6, 16, 52, 20
    panel = columns * (cell + gap) - gap
    width = margin + len(panels) * (panel + 2 * margin) - margin
    drawing = Drawing(width, head + rows * (cell + gap) + margin)
    for i, (title, images, framed) in enumerate(panels):
        left = margin + i * (panel + 2 * margin)
        drawing.text((left, head / 2), fitted(title, size, panel), size, anchor="lm")
        for j in range(count):
            x, y = left + j % columns * (cell + gap), head + j // columns * (cell + gap)
            if framed[j]:
                drawing.rectangle((x - 3, y - 3, x + cell + 3, y + cell + 3), drawing.theme.alarm)
            drawing.picture(Image.fromarray(images[j]).resize((cell, cell), Image.Resampling.NEAREST), x, y)
    return drawing.finished()


def _colour(index: int) -> Colour:
    return COLOURS[index % len(COLOURS)]
