"""The report of an experiment: Markdown, one HTML page, plots, and the runs as CSV and JSON."""

import base64
import html
import io
import json
import re
from pathlib import Path
from typing import Any

from ...files import write_json, write_whole
from ..class_removal import METHOD_NAMES
from .markdown import table_lines
from .results import Result, Results, read_results, table, to_csv

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-size:13px;margin:1rem 0}td,th{padding:.25rem .6rem;border-bottom:1px solid #ddd;
text-align:right}td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}
img{max-width:100%}pre{background:#f6f6f6;padding:.6rem;overflow-x:auto}tr.bold td{font-weight:600}"""
COLUMNS = {
    "forbidden_share": "left",
    "kl": "KL, paper's form",
    "kl_renormalised": "KL, others",
    "kl_unbiased": "KL, unbiased",
    "frechet_without": "Fréchet, without the class",
    "frechet_all": "Fréchet, all data",
    "precision": "precision",
    "recall": "recall",
    "fid_without": "FID, without the class",
    "fid_all": "FID, all data",
}
CODE = re.compile("`([^`]*)`")
SHARES = ("forbidden_share", "precision", "recall")


def write_reports(folder: Path) -> list[Path]:
    """Write every part of the report into the folder; ValueError if matplotlib is missing or nothing is done."""
    results = read_results(folder)
    try:
        from . import study_plots
    except ModuleNotFoundError as error:
        raise ValueError("plots need matplotlib: pip install matplotlib, then `dng report` on this folder") from error
    pictures: dict[str, dict[str, bytes]] = {}
    written = []
    for removed in results.removed:
        figures = {
            "pareto": study_plots.pareto(results, removed),
            "histograms": study_plots.histograms(results, removed),
            "traces": study_plots.traces(results, removed),
        }
        pictures[removed] = {}
        for kind, figure in figures.items():
            if figure is None:
                continue
            for ending in ("png", "svg"):
                buffer = io.BytesIO()
                figure.savefig(buffer, format=ending, dpi=110)
                written.append(_write(folder / "plots" / f"{kind}-{_slug(removed)}.{ending}", buffer.getvalue()))
                if ending == "png":
                    pictures[removed][kind] = buffer.getvalue()
        buffer = io.BytesIO()
        study_plots.grid(results, removed).save(buffer, "PNG")
        pictures[removed]["images"] = buffer.getvalue()
        written.append(_write(folder / "plots" / f"images-{_slug(removed)}.png", buffer.getvalue()))
    rows = table(results.results)
    write_json(folder / "runs.json", {"manifest": results.manifest, "runs": rows})
    written += [
        folder / "runs.json",
        _write(folder / "runs.csv", to_csv(rows).encode()),
        _write(folder / "report.md", markdown(results).encode()),
        _write(folder / "report.html", page(results, pictures).encode()),
    ]
    return [path for path in written if path.parent == folder]


def markdown(results: Results) -> str:
    """The report as Markdown, plots by their file names."""
    lines = [f"# {_title(results)}", "", *(f"{paragraph}\n" for paragraph in _introduction(results))]
    lines += [*table_lines(*overview_table(results)), ""]
    if tuned := tuned_table(results):
        lines += [*table_lines(*tuned), ""]
    for removed in results.removed:
        lines += [f"## {removed} removed", "", *table_lines(*best_table(results, removed)), ""]
        slug = _slug(removed)
        for kind in ("pareto", "histograms", "traces", "images"):
            if (results.folder / "plots" / f"{kind}-{slug}.png").is_file():
                lines += [f"![{kind}, {removed} removed](plots/{kind}-{slug}.png)", ""]
    return "\n".join(lines)


def page(results: Results, pictures: dict[str, dict[str, bytes]]) -> str:
    """The report as one self-contained HTML page."""
    body = [f"<h1>{html.escape(_title(results))}</h1>"]
    body += [f"<p>{CODE.sub(_code, html.escape(line))}</p>" for line in _introduction(results)]
    body.append(_html_table(*overview_table(results)))
    if tuned := tuned_table(results):
        body.append(_html_table(*tuned))
    for removed in results.removed:
        body.append(f"<h2>{html.escape(removed)} removed</h2>")
        body.append(_html_table(*best_table(results, removed)))
        for kind, content in pictures[removed].items():
            encoded = base64.b64encode(content).decode()
            body.append(f'<img alt="{kind}, {html.escape(removed)} removed" src="data:image/png;base64,{encoded}">')
        body.append("<details><summary>every point</summary>")
        body.append(_html_table(*every_table(results, removed)) + "</details>")
    body.append(f"<h2>Experiment</h2><pre>{html.escape(json.dumps(results.manifest['experiment'], indent=1))}</pre>")
    title = html.escape(_title(results))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"</head><body>{''.join(body)}</body></html>\n"
    )


def overview_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Head and rows: for each class, what each method at its best leaves, its balance and its distance."""
    measures = {"forbidden_share": "left", "kl_renormalised": "KL", "frechet_without": "Fréchet"}
    by_class = {name: _unguided_and_best(results, name) for name in results.removed}
    methods = [m for m in METHOD_NAMES.values() if any(m in (r.method for r in rows) for rows in by_class.values())]
    shown = {
        k: v for k, v in measures.items() if any(r.value(k) is not None for rows in by_class.values() for r in rows)
    }
    body = []
    for name, rows in by_class.items():
        of = {r.method: r for r in rows}
        cells = [_number(of[m], k) if m in of else "–" for k in shown for m in methods]
        body.append([name, *cells])
    return ["removed", *(f"{label}, {m}" for label in shown.values() for m in methods)], body


def best_table(results: Results, removed: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the unguided model, and each method at its best."""
    return _cells(results, _unguided_and_best(results, removed))


def every_table(results: Results, removed: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows: every point of the class, the search's included."""
    return _cells(results, results.of(removed, "baseline", "search", "sweep"))


def verdict(results: Results, chosen_by: str, *compared: str) -> str:
    """For how many classes DNG's best safe point beats every other method's in all measures ``compared``.

    ``chosen_by``: the measure that is least at a method's best point.
    """
    better, decided, unsafe = 0, 0, []
    for removed in results.removed:
        best = results.best(removed, chosen_by)
        dng = best.get("DNG")
        rivals = [r for m, r in best.items() if m != "DNG"]
        if dng is None or not rivals or any(dng.value(measure) is None for measure in compared):
            continue
        decided += 1
        if not results.is_safe(dng):
            unsafe.append(removed)
            continue
        safe_rivals = [r for r in rivals if results.is_safe(r)]
        better += all(_is_lower(dng, rival, measure) for rival in safe_rivals for measure in compared)
    names = " and ".join(COLUMNS[measure] for measure in compared)
    if not decided:
        return f"{names}: not yet measured."
    text = (
        f"{names}: at a forbidden share of {results.target:.1%} or less, DNG is lower than every other method for "
        f"{better} of {decided} classes. Each method stands at its point with the least {COLUMNS[chosen_by]}. "
        "A method that never reaches that share counts as beaten."
    )
    return text + (f" DNG itself does not get there for: {', '.join(unsafe)}." if unsafe else "")


def _is_lower(ours: Result, theirs: Result, measure: str) -> bool:
    """Whether ``ours`` has the lower measure; also true where ``theirs`` has none."""
    mine, other = ours.value(measure), theirs.value(measure)
    return other is None or (mine is not None and mine < other)


def tuned_table(results: Results) -> tuple[list[str], list[list[str]]] | None:
    """Head and rows: what is left here, and what was left where the settings were tuned; None if that was here."""
    tuned = results.manifest.get("settings_of")
    if tuned is None:
        return None
    there, here = tuned["steps"], results.manifest["experiment"]["steps"]
    body = []
    for removed in results.removed:
        for method, result in results.best(removed).items():
            before, now = tuned["left"][removed][method], result.value("forbidden_share") or 0.0
            body.append([removed, method, f"{before:.1%}", f"{now:.1%}", f"{100 * (now - before):+.1f}"])
    return ["removed", "method", f"left, {there} steps (tuned)", f"left, {here} steps", "difference, points"], body


def _introduction(results: Results) -> list[str]:
    m, e = results.manifest, results.manifest["experiment"]
    every = e.get("undesired_every", 1)
    lines = [
        f"Made by `{m['command']}`: {e['images']} images per point, {e['steps']} steps ({e['spacing']} spacing, "
        f"ancestral, {e['variance']} variance"
        + (f", the undesired class predicted once in {every} steps" if every > 1 else "")
        + f"), seed {e['seed']}; {m['machine']}, torch {m['versions']['torch']}.",
        f"{m['note'][0].upper()}{m['note'][1:]}. Fréchet distances are in the features of the classifier "
        f"{e['classifier']!r}, and not FID. Each method stands at the settings with the least KL among its points "
        f"with at most {results.target:.1%} left, or else at its safest. It is chosen and shown on the same images. "
        "Intervals (95 %) are Wilson's for shares, and otherwise basic bootstrap intervals for the value that many "
        "images would give: with few images, a divergence or distance can lie above its own interval.",
        verdict(results, "kl_renormalised", "kl_renormalised"),
        verdict(results, "frechet_without", "frechet_without"),
        verdict(results, "kl_renormalised", "kl_renormalised", "frechet_without"),
    ]
    if results.missing:
        lines.append(f"Points that are not there yet: {results.missing}. Give the command again to complete them.")
    return lines


def _cells(results: Results, rows: list[Result]) -> tuple[list[str], list[list[str]]]:
    shown = [name for name in COLUMNS if any(r.value(name) is not None for r in rows)]
    head = ["method", "settings", "images", *(COLUMNS[name] for name in shown), "class kept", "RMS change"]
    body = []
    for r in rows:
        changes = ["–", "–"]
        if r.change is not None and r.change.images:
            changes = [f"{r.change.kept:.1%}", f"{r.change.rms:.3f}"]
        figures = [_figure(r, name) for name in shown]
        body.append([r.method, _settings(r), str(r.point.images), *figures, *changes])
    return head, body


def _unguided_and_best(results: Results, removed: str) -> list[Result]:
    return [*results.of(removed, "baseline"), *results.best(removed).values()]


def _figure(result: Result, name: str) -> str:
    low, high = result.interval(name)
    if low is None or high is None:
        return _number(result, name)
    return f"{_number(result, name)} ({_form(low, name)} .. {_form(high, name)})"


def _number(result: Result, name: str) -> str:
    value = result.value(name)
    return "–" if value is None else _form(value, name)


def _form(value: float, name: str) -> str:
    return f"{value:.1%}" if name in SHARES else f"{value:.3f}"


def _code(found: re.Match[str]) -> str:
    return f"<code>{found[1]}</code>"


def _settings(result: Result) -> str:
    settings = result.point.settings
    if settings is None:
        return ""
    default = type(settings)()
    changed: dict[str, Any] = {k: v for k, v in vars(settings).items() if v != getattr(default, k)}
    changed["guidance_scale"] = settings.guidance_scale
    return ", ".join(f"{k} {v:g}" for k, v in changed.items() if isinstance(v, int | float))


def _html_table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{html.escape(c)}</th>" for c in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _title(results: Results) -> str:
    return f"Class removal: {results.manifest['experiment']['name']}"


def _slug(name: str) -> str:
    """A class name as part of a file name; no two classes have the same."""
    return "".join(c if c.isalnum() else f"_{ord(c):x}_" for c in name)


def _write(path: Path, content: bytes) -> Path:
    write_whole(path, content)
    return path
