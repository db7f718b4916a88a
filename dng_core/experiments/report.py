"""The report of class removal: one row per method, as a table, a bar chart and a contact sheet.

Pictures are drawn with Pillow, which every ComfyUI has.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .metrics import (
    balance_kl,
    balance_kl_renormalised,
    change_from_baseline,
    class_histogram,
    forbidden_share,
    wilson_interval,
)
from .networks import Classifier

INK = (38, 38, 38)
FAINT = (215, 215, 215)
ALARM = (214, 39, 40)
COLOURS = ((127, 127, 127), (230, 159, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (86, 180, 233))
# Okabe and Ito's palette, which colour-blind readers can tell apart; grey for the first row, usually "no guidance"
SHEET_IMAGES = 64  # per method
SHEET_CELL = 56  # smallest side of an image on the sheet, in pixels


@dataclass(frozen=True)
class Row:
    """The figures of one method; what they are is defined in :mod:`metrics`.

    ``kept``, ``rms_change`` and ``compared`` (the number of images they rest on) are None without a baseline. The
    RMS change is in the classifier's data range (-1 .. 1). NaN is written as None.
    """

    name: str
    images: int
    forbidden_class: str
    forbidden_share: float
    forbidden_low: float
    forbidden_high: float
    kl: float
    kl_renormalised: float | None
    kept: float | None
    rms_change: float | None
    compared: int | None
    histogram: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Pictures:
    """The first images of a method, (n, height, width, 3) uint8, and which of them show the forbidden class."""

    images: np.ndarray
    forbidden: tuple[bool, ...]


@dataclass(frozen=True)
class Report:
    """Rows measured on one removed class, in the order they were added."""

    class_names: tuple[str, ...]
    forbidden: int
    rows: tuple[Row, ...] = ()
    pictures: tuple[Pictures, ...] = ()

    def with_row(self, row: Row, pictures: Pictures) -> "Report":
        return replace(self, rows=(*self.rows, row), pictures=(*self.pictures, pictures))


@torch.no_grad()
def classify(classifier: Classifier, images: Tensor, batch: int = 500) -> Tensor:
    """The class of each image, (n,) long; ``images``: (n, channels, height, width) in the classifier's range."""
    return torch.cat([classifier(part).argmax(dim=1) for part in images.split(batch)])


def measure(
    name: str,
    images: Tensor,
    classifier: Classifier,
    class_names: Sequence[str],
    forbidden: int,
    baseline: Tensor | None = None,
) -> tuple[Row, Pictures]:
    """Measure one method.

    Parameters
    ----------
    images, baseline: (n, channels, height, width) in the classifier's range, -1 .. 1, of the same seeds.

    Raises
    ------
    ValueError: if the baseline's shape is not the images'.
    """
    classes = classify(classifier, images)
    histogram = class_histogram(classes, len(class_names))
    low, high = wilson_interval(histogram[forbidden], len(images))
    change = None
    if baseline is not None:
        change = change_from_baseline(images, classes, baseline, classify(classifier, baseline), forbidden)

    row = Row(
        name=name,
        images=len(images),
        forbidden_class=class_names[forbidden],
        forbidden_share=forbidden_share(histogram, forbidden),
        forbidden_low=low,
        forbidden_high=high,
        kl=balance_kl(histogram, forbidden),
        kl_renormalised=_none_if_nan(balance_kl_renormalised(histogram, forbidden)),
        kept=_none_if_nan(change.kept) if change else None,
        rms_change=_none_if_nan(change.rms) if change else None,
        compared=change.images if change else None,
        histogram=dict(zip(class_names, histogram, strict=True)),
    )
    shown = ((images[:SHEET_IMAGES].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    shown = shown.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu()
    return row, Pictures(shown.numpy(), tuple((classes[:SHEET_IMAGES] == forbidden).tolist()))


def markdown_table(report: Report) -> str:
    """The figures as a Markdown table, the shares of every class included."""
    forbidden = report.class_names[report.forbidden]
    head = [
        "method",
        "images",
        f"still {forbidden} (95 %)",
        "KL, paper",
        "KL, others",
        "keep class",
        "RMS change",
        *(f"{name}" for name in report.class_names),
    ]
    lines = [_line(head), _line(["---"] + ["---:"] * (len(head) - 1))]
    for row in report.rows:
        lines.append(
            _line(
                [
                    row.name.replace("|", "\\|"),
                    str(row.images),
                    f"{row.forbidden_share:.1%} ({row.forbidden_low:.1%} .. {row.forbidden_high:.1%})",
                    f"{row.kl:.3f}",
                    "–" if row.kl_renormalised is None else f"{row.kl_renormalised:.3f}",
                    "–" if row.kept is None else f"{row.kept:.1%}",
                    "–" if row.rms_change is None else f"{row.rms_change:.3f}",
                    *(f"{n / row.images:.1%}" for n in row.histogram.values()),
                ]
            )
        )
    return "\n".join(lines)


def bar_chart(report: Report, width: int = 960, height: int = 480) -> Image.Image:
    """Share of each class, one bar per method; the dashed line is an even share of the classes that remain."""
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    font, small = ImageFont.load_default(18), ImageFont.load_default(15)
    left, right, bottom = 64, width - 20, height - 60
    removed = report.class_names[report.forbidden]
    draw.text((left, 10), f"Share of each class, with {removed} removed", fill=INK, font=font)
    x, y = float(left), 53
    for i, row in enumerate(report.rows):
        label = f"{row.name}: {row.forbidden_share:.1%} still {removed}"
        length = 20 + draw.textlength(label, font=small)
        if x > left and x + length > right:
            x, y = float(left), y + 22
        draw.rectangle((x, y - 7, x + 14, y + 7), fill=_colour(i))
        draw.text((x + 20, y), label, fill=INK, font=small, anchor="lm")
        x += length + 28
    top = y + 31

    shares = [[n / row.images for n in row.histogram.values()] for row in report.rows]
    even = 1 / (len(report.class_names) - 1)
    step = _tick(max(even, *(max(s) for s in shares)))
    ceiling = step * math.ceil(max(even, *(max(s) for s in shares)) / step + 1e-9)

    def level(share: float) -> float:
        return bottom - (bottom - top) * share / ceiling

    group = (right - left) / len(report.class_names)
    x = left + report.forbidden * group
    draw.rectangle((x, top, x + group, bottom), fill=(253, 236, 236))
    for i in range(round(ceiling / step) + 1):
        draw.line((left, level(i * step), right, level(i * step)), fill=FAINT)
        draw.text((left - 8, level(i * step)), f"{i * step:.0%}", fill=INK, font=small, anchor="rm")
    for start in range(left, right, 12):
        draw.line((start, level(even), min(start + 6, right), level(even)), fill=INK)

    bar = 0.8 * group / len(report.rows)
    for i, values in enumerate(shares):
        for c, share in enumerate(values):
            x = left + c * group + 0.1 * group + i * bar
            if share:
                draw.rectangle((x, min(level(share), bottom - 1), x + bar - 1, bottom), fill=_colour(i))
    draw.line((left, bottom, right, bottom), fill=INK, width=2)
    for c, name in enumerate(report.class_names):
        colour = ALARM if c == report.forbidden else INK
        draw.text((left + (c + 0.5) * group, bottom + 8), name, fill=colour, font=font, anchor="ma")
    draw.text(((left + right) / 2, height - 8), "class, as the classifier sees it", fill=INK, font=small, anchor="ms")

    return picture


def contact_sheet(report: Report) -> Image.Image:
    """The methods' first images side by side, the same seed in the same place; a red frame: still forbidden."""
    font = ImageFont.load_default(20)
    count = min(SHEET_IMAGES, *(len(p.images) for p in report.pictures))
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    size = max(max(p.images.shape[1:3]) for p in report.pictures)
    cell = size * max(1, math.ceil(SHEET_CELL / size))
    gap, margin, head = 6, 16, 52
    panel = columns * (cell + gap) - gap
    width = margin + len(report.rows) * (panel + 2 * margin) - margin
    picture = Image.new("RGB", (width, head + rows * (cell + gap) + margin), "white")
    draw = ImageDraw.Draw(picture)

    removed = report.class_names[report.forbidden]
    for i, (row, shown) in enumerate(zip(report.rows, report.pictures, strict=True)):
        left = margin + i * (panel + 2 * margin)
        title = _fitted(draw, f"{row.name}: {row.forbidden_share:.1%} still {removed}", font, panel)
        draw.text((left, head / 2), title, fill=INK, font=font, anchor="lm")
        for j in range(count):
            x, y = left + j % columns * (cell + gap), head + j // columns * (cell + gap)
            image = Image.fromarray(shown.images[j]).resize((cell, cell), Image.Resampling.NEAREST)
            if shown.forbidden[j]:
                draw.rectangle((x - 3, y - 3, x + cell + 2, y + cell + 2), fill=ALARM)
            picture.paste(image, (x, y))
    return picture


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _colour(index: int) -> tuple[int, int, int]:
    return COLOURS[index % len(COLOURS)]


def _tick(largest: float) -> float:
    """A round spacing that divides 0 .. largest into at most eight parts."""
    return next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if largest / step <= 8)


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: Any, width: float) -> str:
    while draw.textlength(text, font=font) > width and len(text) > 1:
        text = text[:-2] + "…"
    return text
