"""The study's report: one Markdown and one HTML file from its results."""

import base64
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ...files import write_whole
from ..report.markdown import table_lines
from .cases import KINDS

Row = dict[str, Any]
Part = tuple[
    str, list[str], list[list[str]], list[Row]
]  # title, head and lines of a table, rows whose pictures follow
MEANINGS = (
    "left: percent of the pictures that show the thing, with the 95 % interval. kept: percent of what the prompt "
    "asks for. rms: root mean square of the change of the pictures that never showed the thing, in thousandths of "
    "a pixel's range. relabelled: percent of their labels that changed. balance: mean difference of the shares of "
    "all other labels, in points. distance: Fréchet distance, in the judge's features, to pictures without guidance "
    "that do not show the thing. late scale: mean guidance scale after half of the steps."
)
COLUMNS = ("left, %", "kept, %", "rms", "relabelled, %", "balance", "distance", "late scale", "evaluations", "seconds")


def write_report(folder: Path) -> list[Path]:
    """Write report.md and report.html from results.json, and return both paths."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows, scales = results["rows"], results["scales"]
    settings = list(dict.fromkeys((row["cfg"], row["sampler"], row["steps"]) for row in rows))
    parts: list[Part] = []
    for cfg, sampler, steps in settings:
        name = f"cfg {cfg:g}, {sampler}, {steps} steps"
        here = [row for row in rows if (row["cfg"], row["sampler"], row["steps"]) == (cfg, sampler, steps)]
        for kind in KINDS:
            of_kind = [row for row in here if row["kind"] == kind]
            if of_kind:
                parts.append((f"{kind.capitalize()} cases in the mean, {name}", *summary(of_kind, scales), []))
        for case in dict.fromkeys(row["case"] for row in here):
            of_case = [row for row in here if row["case"] == case]
            first = of_case[0]
            head = f"{case} ({first['kind']}), {100 * first['was']:.1f} % without guidance, {name}"
            parts.append((head, *case_table(of_case), of_case))
    return [
        _write(folder / "report.md", markdown(parts)),
        _write(folder / "report.html", page(parts, folder)),
    ]


def summary(rows: Sequence[Row], scales: dict[str, float]) -> tuple[list[str], list[list[str]]]:
    """Each method's means over the cases, and at which scale."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        means = {key: mean_of(row[key] for row in own) for key in own[0] if key in _FORMS}
        lines.append([method, f"{scales[method]:g}" if scales[method] else "", *cells(means)])
    return ["method", "scale", *COLUMNS], lines


def case_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Each method's measures of one case."""
    lines = [[row["method"], *cells(row)] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        line[1] += f" ({100 * row['left_low']:.1f} to {100 * row['left_high']:.1f})"
    return ["method", *COLUMNS], lines


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


def cells(values: Row) -> list[str]:
    """A cell for each of COLUMNS; empty for what was not measured."""
    return [
        "" if values[key] is None else f"{factor * values[key]:.{digits}f}" for key, (factor, digits) in _FORMS.items()
    ]


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of what was measured."""
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def markdown(parts: Sequence[Part]) -> str:
    """The report as Markdown."""
    lines = ["# Picture book: avoid a thing", "", MEANINGS]
    for title, head, table, _ in parts:
        lines += ["", f"## {title}", "", *table_lines(head, table)]
    return "\n".join(lines) + "\n"


def page(parts: Sequence[Part], folder: Path) -> str:
    """The report as one HTML file, with the first pictures of every point."""
    body = ["<h1>Picture book: avoid a thing</h1>", f"<p>{html.escape(MEANINGS)}</p>"]
    for title, head, table, rows in parts:
        body += [f"<h2>{html.escape(title)}</h2>", _html_table(head, table)]
        for row in rows:
            content = base64.b64encode((folder / "rows" / f"{row['key']}.png").read_bytes()).decode()
            picture = f'<img alt="" src="data:image/png;base64,{content}">'
            body.append(f"<figure>{picture}<figcaption>{html.escape(row['method'])}</figcaption></figure>")
    style = (
        "body{font:15px sans-serif;margin:2em}table{border-collapse:collapse}td,th{padding:2px 8px;text-align:right;"
        "border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}figure{margin:4px 0}"
        "img{width:768px;image-rendering:pixelated}"
    )
    return f"<!doctype html><meta charset=utf-8><title>Picture book</title><style>{style}</style>" + "\n".join(body)


def _html_table(head: Sequence[str], table: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in table)
    return f"<table><tr>{top}</tr>{rows}</table>"


def _write(path: Path, text: str) -> Path:
    write_whole(path, text.encode())
    return path
