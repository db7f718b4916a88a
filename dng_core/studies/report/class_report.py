"""The report of class removal: one row per method, as a table, a bar chart and a contact sheet."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...models.networks import Classifier
from ...plots.class_pictures import image_sheet, share_bars
from ..metrics import (
    balance_kl,
    balance_kl_renormalised,
    change_from_baseline,
    class_histogram,
    forbidden_share,
    wilson_interval,
)
from .markdown import line

SHEET_IMAGES = 64  # per method: a choice


@dataclass(frozen=True)
class MethodFigures:
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
    rows: tuple[MethodFigures, ...] = ()
    pictures: tuple[Pictures, ...] = ()

    def with_row(self, row: MethodFigures, pictures: Pictures) -> "Report":
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
) -> tuple[MethodFigures, Pictures]:
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

    row = MethodFigures(
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
    measures = ["images", f"still {forbidden} (95 %)", "KL, paper", "KL, others", "keep class", "RMS change"]
    head = ["method", *measures, *report.class_names]
    lines = [line(head), line(["---"] + ["---:"] * (len(head) - 1))]
    for row in report.rows:
        cells = [
            row.name.replace("|", "\\|"),
            str(row.images),
            f"{row.forbidden_share:.1%} ({row.forbidden_low:.1%} .. {row.forbidden_high:.1%})",
            f"{row.kl:.3f}",
            "–" if row.kl_renormalised is None else f"{row.kl_renormalised:.3f}",
            "–" if row.kept is None else f"{row.kept:.1%}",
            "–" if row.rms_change is None else f"{row.rms_change:.3f}",
        ]
        lines.append(line([*cells, *(f"{n / row.images:.1%}" for n in row.histogram.values())]))
    return "\n".join(lines)


def bar_chart(report: Report) -> Image.Image:
    """Share of each class, one bar per method."""
    removed = report.class_names[report.forbidden]
    methods = [
        (f"{row.name}: {row.forbidden_share:.1%} still {removed}", [n / row.images for n in row.histogram.values()])
        for row in report.rows
    ]
    title = f"Share of each class, with {removed} removed"
    return share_bars(title, report.class_names, report.forbidden, methods)


def contact_sheet(report: Report) -> Image.Image:
    """The methods' first images, the same seed in the same place. A red frame marks the forbidden class."""
    removed = report.class_names[report.forbidden]
    return image_sheet(
        [
            (f"{row.name}: {row.forbidden_share:.1%} still {removed}", shown.images, shown.forbidden)
            for row, shown in zip(report.rows, report.pictures, strict=True)
        ]
    )


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
