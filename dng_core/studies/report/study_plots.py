"""Plots of class removal, by matplotlib; each returns a figure."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ...methods import MethodSettings
from ...plots.class_pictures import image_sheet
from ..class_removal import Drawn
from ..metrics import forbidden_share, wilson_interval
from .fronts import FrontPoint, bars, draw_points
from .results import Result, Results

COLOURS = {"none": "#7f7f7f", "NP": "#e69f00", "SLD": "#009e73", "CCFG": "#cc79a7", "DNG": "#0072b2"}  # Okabe and Ito
MARKERS = {"none": "X", "NP": "s", "SLD": "^", "CCFG": "D", "DNG": "o"}
AXES = {
    "kl_renormalised": "KL(uniform \u2016 other classes), nats",
    "frechet_without": "Fréchet distance, classifier features",
    "fid_without": "FID",
}
SHEET_IMAGES = 36  # per method: a choice


def pareto(results: Results, removed: str) -> Figure:
    """Balance and quality against safety, with 95 % intervals. Lines join points that differ only in scale."""
    rows = results.of(removed, "baseline", "sweep")
    shown = [m for m in AXES if m == "kl_renormalised" or any(r.value(m) is not None for r in rows)]
    figure = Figure(figsize=(5.2 * len(shown), 4.0), layout="constrained")
    for i, measure in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), i + 1)
        for method in COLOURS:
            _front(axes, sorted((r for r in rows if r.method == method), key=lambda r: r.scale), measure, method)
        axes.axvline(100 * results.target, color="0.6", linestyle="--", linewidth=1)
        axes.set_xlabel(f"images that still show {removed}, %  (dashed: what counts as safe)")
        axes.set_ylabel(AXES[measure])
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=min([0.0, *(1.1 * y for r in rows if (y := r.value(measure)) is not None)]))
        axes.grid(alpha=0.25)
        if i == 0 and axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.suptitle(f"{removed} removed: down and left is better")
    return figure


def _front(axes: Axes, rows: Sequence[Result], measure: str, method: str) -> None:
    values = ((r, r.value("forbidden_share"), r.value(measure)) for r in rows)
    points = [(r, x, y) for r, x, y in values if x is not None and y is not None]
    if not points:
        return
    placed = [
        FrontPoint(
            100 * x, y, bars(r.interval("forbidden_share"), x, 100.0), bars(r.interval(measure), y, 1.0),
            f"{r.scale:g}" if r.scale else "",
        )
        for r, x, y in points
    ]  # fmt: skip
    draw_points(axes, placed, COLOURS[method], MARKERS[method], method)
    for others in dict.fromkeys(_but_scale(r) for r, _, _ in points):
        joined = [(100 * x, y) for r, x, y in points if _but_scale(r) == others]
        axes.plot(*zip(*joined, strict=True), color=COLOURS[method], linewidth=1.4)


def _but_scale(result: Result) -> MethodSettings | None:
    return result.point.settings and replace(result.point.settings, guidance_scale=0.0)


def histograms(results: Results, removed: str) -> Figure:
    """The share of each class under each method at its best; the line is an even share of those that remain."""
    rows = [*results.of(removed, "baseline"), *results.best(removed).values()]
    names = results.class_names
    figure = Figure(figsize=(max(6.0, 0.9 * len(names)), 3.4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        shares = [100 * n / row.measures["images"] for n in row.measures["histogram"].values()]
        spread = [bars(wilson_interval(n, row.measures["images"]), n / row.measures["images"], 100)
                  for n in row.measures["histogram"].values()]  # fmt: skip
        places = np.arange(len(names)) + (i - (len(rows) - 1) / 2) * width
        axes.bar(places, shares, width, color=COLOURS[row.method], label=_title(row),
                 yerr=np.array(spread).T, error_kw={"elinewidth": 0.6})  # fmt: skip
    axes.axhline(100 / (len(names) - 1), color="0.4", linestyle="--", linewidth=1)
    axes.set_xticks(np.arange(len(names)), names)
    axes.get_xticklabels()[names.index(removed)].set_color("#d62728")
    axes.set_ylabel("share of images, %")
    axes.set_xlabel(f"class, as the classifier sees it ({removed} removed)")
    axes.legend(frameon=False, ncols=len(rows), loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def traces(results: Results, removed: str) -> Figure | None:
    """Posterior and guidance scale over the steps for single images of DNG at its best; None without DNG."""
    result = results.best(removed).get("DNG")
    if result is None:
        return None
    drawn = results.drawn(result)
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    panels = (("posterior p(removed | x)", drawn.posterior), ("guidance scale \u03bb", drawn.scale))
    for i, (title, values) in enumerate(panels):
        axes = figure.add_subplot(1, 2, i + 1)
        labelled = set()
        for k, image in enumerate(drawn.traced):
            left = result.classes[image] == result.label
            label = f"still {removed}" if left else "another class"
            colour, named = "#d62728" if left else "#0072b2", None if label in labelled else label
            axes.plot(np.arange(len(values)), values[:, k], color=colour, alpha=0.8, linewidth=1.1, label=named)
            labelled.add(label)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(title)
        axes.grid(alpha=0.25)
        if i == 0:
            axes.set_yscale("log")
            axes.legend(frameon=False)
    figure.suptitle(f"{removed} removed by {_title(result)}: single images")
    return figure


def grid(results: Results, removed: str) -> Image.Image:
    """The first images of each method at its best, the same seed in the same place. Frames mark the removed class."""
    rows = [*results.of(removed, "baseline"), *results.best(removed).values()]
    return image_sheet([_of_sheet(row, results.drawn(row)) for row in rows])


def _of_sheet(result: Result, drawn: Drawn) -> tuple[str, np.ndarray, list[bool]]:
    """What :func:`image_sheet` shows of a method: its title, its first images, and which of them are framed."""
    images = np.repeat(drawn.images[:SHEET_IMAGES], 3 // drawn.images.shape[1], axis=1).transpose(0, 2, 3, 1)
    share = forbidden_share(list(result.measures["histogram"].values()), result.label)
    framed = [kind == result.label for kind in result.classes[:SHEET_IMAGES]]
    return f"{_title(result)}: {share:.1%} still {result.removed}", images, framed


def _title(result: Result) -> str:
    return result.method if result.point.settings is None else f"{result.method} {result.scale:g}"
