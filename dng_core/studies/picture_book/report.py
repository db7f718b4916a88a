"""The study's report: one Markdown and one HTML file from its results, and plots."""

import base64
import html
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...files import write_whole
from ..report.markdown import table_lines
from .averages import Row, averaged
from .cases import KINDS
from .study import RESULTS, ROWS

MEANINGS = (
    "left: percent of the pictures that show the thing. kept: percent of what the prompt asks for. rms: root mean "
    "square of the change of the pictures that never showed the thing, in thousandths of a pixel's range. "
    "relabelled: percent of their labels that changed. balance: mean difference of the shares of all other labels, in "
    "points. distance: Fréchet distance, in the judge's features, to pictures without guidance that do not show the "
    "thing; with few pictures it is far above 0 even for the same distribution, so compare it with that of nothing. "
    "late scale: mean guidance scale after half of the steps. Brackets hold 95 % intervals for these cases and other "
    "noise: Wilson's for left, and otherwise basic bootstrap intervals for the value that many pictures would give. A "
    "distance can therefore lie above its own interval."
)
COLUMNS = ("left, %", "kept, %", "rms", "relabelled, %", "balance", "distance", "late scale", "evaluations", "seconds")
_FORMS = {  # factor and digits of each column's measure
    "left": (100, 1),
    "kept": (100, 1),
    "rms": (1000, 1),
    "relabelled": (100, 2),
    "balance": (100, 2),
    "distance": (1, 2),
    "late_scale": (1, 3),
    "evaluations": (1, 0),
    "seconds": (1, 2),
}


STOCK = "negative_prompt"
LATE_SCALE = 0.02  # below it, guidance of the second half of the steps is as good as off
BETTER: dict[str, dict[str, tuple[str, Callable[[Row, Row], bool]]]] = {  # by kind: what is compared, and how
    "related": {
        "left: at most as much": ("left", lambda row, stock: row["left"] <= stock["left"]),
        "rms: at most half": ("rms", lambda row, stock: row["rms"] <= stock["rms"] / 2),
        "relabelled: at most half": ("relabelled", lambda row, stock: row["relabelled"] <= stock["relabelled"] / 2),
        "kept: at least as much": ("kept", lambda row, stock: row["kept"] >= stock["kept"]),
        "distance: lower": ("distance", lambda row, stock: row["distance"] < stock["distance"]),
    },
    "unrelated": {
        "rms: at most a tenth": ("rms", lambda row, stock: row["rms"] <= stock["rms"] / 10),
        "kept: at least as much": ("kept", lambda row, stock: row["kept"] >= stock["kept"]),
        "distance: lower": ("distance", lambda row, stock: row["distance"] < stock["distance"]),
        f"late scale: below {LATE_SCALE:g}": ("late_scale", lambda row, stock: row["late_scale"] < LATE_SCALE),
    },
}


@dataclass(frozen=True)
class Part:
    """A section: a table, plots by name (PNG), and rows whose pictures follow."""

    title: str
    head: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    plots: Mapping[str, bytes] = field(default_factory=dict)
    rows: Sequence[Row] = ()


def write_report(folder: Path) -> list[Path]:
    """Write report.md and report.html, whose paths are returned, and plots/, from results.json."""
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    made = sections(folder, results["rows"], results["scales"], results["own_scales"] or {})
    for part in made:
        for name, content in part.plots.items():
            write_whole(folder / "plots" / f"{name}.png", content)
    about = introduction(results["about"], bool(results["own_scales"]))
    return [
        _write(folder / "report.md", markdown(about, made)),
        _write(folder / "report.html", page(about, made, folder)),
    ]


def introduction(about: Mapping[str, Any], own: bool) -> list[str]:
    """The paragraphs above the tables. ``own``: whether every related case has a scale of its own."""
    made = f"Made by `{about['command']}`, " if "command" in about else ""
    on = f" on {about['machine']}, torch {about['versions']['torch']}" if "machine" in about else ""
    scales = ", ".join(f"{scale:g}" for scale in about["scales"])
    least = f"or else the one that leaves least, by {about['search_images']} other pictures of a case."
    if len(about["scales"]) == 1:
        how = f"Every method's scale is {scales}, as it was given."
    else:
        how = (
            f"Each method's scale is one for all cases: the smallest of {scales} that leaves at most 2 % in the mean, "
            f"{least} The mean is over the related cases in which a quarter of the pictures or more show the thing, "
            "and not all."
        )
    if own:
        how += f" A related case has a scale of its own: the smallest that leaves at most 2 % of it, {least}"
    begin = f"{made}{about['images']} pictures a case, seed {about['seed']}{on}. "
    return [begin[0].upper() + begin[1:] + how, MEANINGS]


def sections(
    folder: Path, rows: Sequence[Row], scales: Mapping[str, float], own: Mapping[str, Mapping[str, float]]
) -> list[Part]:
    """For every setting: the means over each kind of case, traces of single pictures, and each case by itself.

    ``own``: the scales of a method by the names of cases, where they are others than ``scales``.
    """
    from .plots import pareto  # needs matplotlib

    parts = []
    for setting in dict.fromkeys((row["cfg"], row["sampler"], row["steps"]) for row in rows):
        cfg, sampler, steps = setting
        name, slug = f"cfg {cfg:g}, {sampler}, {steps} steps", f"cfg{cfg:g}-{sampler}-{steps}"
        here = [row for row in rows if (row["cfg"], row["sampler"], row["steps"]) == setting]
        chosen = [r for r in here if r["scale"] == own.get(r["method"], {}).get(r["case"], scales[r["method"]])]
        for kind in KINDS:
            if of_kind := [row for row in here if row["kind"] == kind]:
                figure = None if own else pareto(of_kind, scales, f"{kind.capitalize()} cases, {name}")
                plots = {} if figure is None else {f"pareto-{kind}-{slug}": _png(figure)}
                table = summary([row for row in chosen if row["kind"] == kind])
                parts.append(Part(f"{kind.capitalize()} cases in the mean, {name}", *table, plots))
                if compared := comparison([row for row in chosen if row["kind"] == kind]):
                    title = f"{kind.capitalize()} cases in which a method does better than the stock negative prompt"
                    parts.append(Part(f"{title}, {name}", *compared))
        if traced := trace_plots(folder, chosen, name, slug):
            parts.append(Part(f"Posterior and guidance scale of single pictures, {name}", plots=traced))
        for case in dict.fromkeys(row["case"] for row in chosen):
            of_case = [row for row in chosen if row["case"] == case]
            was = f"{100 * of_case[0]['was']:.1f} % without guidance"
            title = f"{case} ({of_case[0]['kind']}), {was}, {name}"
            parts.append(Part(title, *case_table(of_case), rows=of_case))
    return parts


def comparison(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]] | None:
    """In how many of the cases, all of one kind, each method does so much better than the stock negative prompt.

    None where the negative prompt is not among the rows, or its cases have no comparisons (:data:`BETTER`).
    """
    stock = {row["case"]: row for row in rows if row["method"] == STOCK}
    better = BETTER.get(rows[0]["kind"]) if rows else None
    others = [method for method in dict.fromkeys(row["method"] for row in rows) if method not in (STOCK, "nothing")]
    if not stock or not better or not others:
        return None
    lines = []
    for method in others:
        pairs = [(row, stock[row["case"]]) for row in rows if row["method"] == method and row["case"] in stock]
        cells = [method]
        for measure, than in better.values():
            known = [pair for pair in pairs if pair[0][measure] is not None]
            cells.append(f"{sum(than(*pair) for pair in known)} of {len(known)}" if known else "")
        lines.append(cells)
    return ["method", *better], lines


def trace_plots(folder: Path, rows: Sequence[Row], setting: str, slug: str) -> dict[str, bytes]:
    """A plot for every method that tracks a posterior: a related and an unrelated case, of one prompt if any."""
    from .plots import traces

    cases = {row["case"]: (row["kind"], row["prompt"]) for row in rows}
    related, unrelated = ([case for case in cases if cases[case][0] == kind] for kind in ("related", "unrelated"))
    pairs = sorted(itertools.product(related, unrelated), key=lambda pair: cases[pair[0]][1] != cases[pair[1]][1])
    pair = pairs[0] if pairs else tuple(cases)[:1]
    plots = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        shown, scale = {}, 0.0
        for row in rows:
            path = folder / ROWS / f"{row['key']}.npz"
            if row["method"] == method and row["case"] in pair and path.is_file():
                scale = row["scale"]
                with np.load(path) as arrays:
                    shown[f"{row['case']} ({row['kind']})"] = dict(arrays)
        if shown:
            plots[f"traces-{method}-{slug}"] = _png(traces(shown, f"{method} at scale {scale:g}, {setting}"))
    return plots


def summary(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Each method's means over the cases, and at which scales."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        scales = sorted({row["scale"] for row in of_method})
        said = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
        lines.append([method, said if scales[-1] else "", *cells(averaged(of_method))])
    return ["method", "scale", *COLUMNS], lines


def case_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Each method's measures of one case, and at which scale."""
    lines = [[row["method"], f"{row['scale']:g}" if row["scale"] else "", *cells(row)] for row in rows]
    return ["method", "scale", *COLUMNS], lines


def cells(values: Row) -> list[str]:
    """A cell for each of COLUMNS, with the interval where there is one; empty for what was not measured."""
    made = []
    for key, (factor, digits) in _FORMS.items():
        value, low, high = (values.get(name) for name in (key, f"{key}_low", f"{key}_high"))
        cell = "" if value is None else f"{factor * value:.{digits}f}"
        if low is not None and high is not None:
            cell += f" ({factor * low:.{digits}f} to {factor * high:.{digits}f})"
        made.append(cell)
    return made


def markdown(about: Sequence[str], parts: Sequence[Part]) -> str:
    """The report as Markdown, plots by their file names."""
    lines = ["# Picture book: avoid a thing"]
    for paragraph in about:
        lines += ["", paragraph]
    for part in parts:
        lines += ["", f"## {part.title}"]
        if part.table:
            lines += ["", *table_lines(part.head, part.table)]
        for name in part.plots:
            lines += ["", f"![{name}](plots/{name}.png)"]
    return "\n".join(lines) + "\n"


def page(about: Sequence[str], parts: Sequence[Part], folder: Path) -> str:
    """The report as one HTML file, with the plots, and the first pictures of every point."""
    body = ["<h1>Picture book: avoid a thing</h1>", *(f"<p>{html.escape(paragraph)}</p>" for paragraph in about)]
    for part in parts:
        body.append(f"<h2>{html.escape(part.title)}</h2>")
        if part.table:
            body.append(_html_table(part.head, part.table))
        for name, content in part.plots.items():
            body.append(f'<p><img class="plot" alt="{html.escape(name)}" src="{_inline(content)}"></p>')
        for row in part.rows:
            strip = _inline((folder / ROWS / f"{row['key']}.png").read_bytes())
            caption = f"<figcaption>{html.escape(row['method'])}</figcaption>"
            body.append(f'<figure><img alt="" src="{strip}">{caption}</figure>')
    style = (
        "body{font:15px sans-serif;margin:2em}table{border-collapse:collapse;font-size:13px}td,th{padding:2px 8px;"
        "text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}"
        "figure{margin:4px 0}figure img{width:768px;image-rendering:pixelated}.plot{max-width:100%}"
    )
    return f"<!doctype html><meta charset=utf-8><title>Picture book</title><style>{style}</style>" + "\n".join(body)


def _html_table(head: Sequence[str], table: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in table)
    return f"<table><tr>{top}</tr>{rows}</table>"


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _write(path: Path, text: str) -> Path:
    write_whole(path, text.encode())
    return path
