"""Plots of the study, by matplotlib; each returns a figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..report.fronts import FrontPoint, bars, draw_points
from .averages import Row, averaged

LOOKS = {  # colours by Okabe and Ito, and two more
    "nothing": ("#7f7f7f", "X"),
    "negative_prompt": ("#e69f00", "s"),
    "constant_push": ("#d55e00", "v"),
    "safe_latent_diffusion": ("#009e73", "^"),
    "perp_neg": ("#8c564b", "P"),
    "nag": ("#bcbd22", "*"),
    "contrastive_cfg": ("#cc79a7", "D"),
    "concept_removal": ("#cc79a7", "X"),
    "dng": ("#56b4e9", "o"),
    "dng_paper": ("#56b4e9", "h"),
    "dng_joint": ("#0072b2", "o"),
    "dng_calibrated": ("#000000", "o"),
    "dng_evidence": ("#0072b2", "*"),
    "dng_evidence_calibrated": ("#000000", "*"),
}
AXES = {
    "rms": ("change of pictures that never showed it,\nRMS, thousandths of a pixel's range", 1000.0),
    "distance": ("Fréchet distance, judge's features", 1.0),
}
STILL, AVOIDED, NEVER = "#d62728", "#e69f00", "#0072b2"  # colours of traces


def pareto(rows: Sequence[Row], scales: Mapping[str, float], title: str) -> Figure | None:
    """What is left against what else changed, each the mean over cases with its 95 % interval; None without both.

    ``rows``: of one kind of case and one setting, at all scales. Lines join a method's scales; the large marker stands
    at the scale that was chosen for it.
    """
    shown = [name for name in AXES if any(row[name] is not None for row in rows)]
    if not shown:
        return None
    figure = Figure(figsize=(5.2 * len(shown) + 2.2, 4.4), layout="constrained")
    for i, measure in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), i + 1)
        label, factor = AXES[measure]
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method and row[measure] is not None]
            placed = {scale: _point(own, scale, measure, factor) for scale in sorted({row["scale"] for row in own})}
            colour, marker = LOOKS[method]
            chosen = [point for scale, point in placed.items() if scale == scales[method]]
            others = [point for scale, point in placed.items() if scale != scales[method]]
            axes.plot([p.x for p in placed.values()], [p.y for p in placed.values()], color=colour, linewidth=1.2)
            if others:
                draw_points(axes, others, colour, marker, None, size=3.5)
            if chosen:
                draw_points(axes, chosen, colour, marker, method, size=7.0)
        axes.set_xlabel("pictures that still show it, %")
        axes.set_ylabel(label)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.grid(alpha=0.25)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(f"{title}: down and left is better; large markers stand at the chosen scale")
    return figure


def _point(rows: Sequence[Row], scale: float, measure: str, factor: float) -> FrontPoint:
    means = averaged([row for row in rows if row["scale"] == scale])
    across, along = ((means[f"{name}_low"], means[f"{name}_high"]) for name in ("left", measure))
    left, value = means["left"], means[measure]
    label = f"{scale:g}" if scale else ""
    return FrontPoint(100 * left, factor * value, bars(across, left, 100.0), bars(along, value, factor), label)


def traces(cases: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """The posterior of the thing and the guidance scale over the steps: a line for each picture, columns for cases.

    ``cases``: what is above each column, and the arrays of its NPZ file.
    """
    figure = Figure(figsize=(4.6 * len(cases) + 0.6, 5.6), layout="constrained")
    rows = (("posterior", "posterior p(thing | x)"), ("scale", "guidance scale (lambda)"))
    grid = figure.subplots(2, len(cases), sharex=True, sharey="row", squeeze=False)
    for column, (name, arrays) in enumerate(cases.items()):
        for row, (key, label) in enumerate(rows):
            axes = grid[row, column]
            for line, still, was in zip(arrays[key].T, arrays["shown"], arrays["was"], strict=True):
                colour = STILL if still else AVOIDED if was else NEVER
                axes.plot(np.arange(len(line)), line, color=colour, alpha=0.8, linewidth=1.1)
            axes.grid(alpha=0.25)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if row == 0:
                axes.set_yscale("log")
                axes.set_title(name, fontsize=9)
            else:
                axes.set_xlabel("step")
            if column == 0:
                axes.set_ylabel(label)
    names = {STILL: "still shows it", AVOIDED: "showed it without guidance", NEVER: "never showed it"}
    lines = [Line2D([], [], color=colour, label=name) for colour, name in names.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(title)
    return figure
