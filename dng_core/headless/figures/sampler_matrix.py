"""The matrix: every sampler and scheduler of a real ComfyUI against the exact answer of the oracle."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from ...settings import PRESETS, Settings
from ..errors import HeadlessError
from .kept import Row
from .oracle_runs import ORACLE_SETTINGS, UNGUIDED, Node, OracleRun, OracleRunner, Task

NODES: tuple[Node, ...] = ("ksampler", "guider", "patch")
SETTINGS = {"oracle": ORACLE_SETTINGS, "cifar10": PRESETS["CIFAR-10"]}


@dataclass(frozen=True)
class Choice:
    """What the figures on samplers run over: every sampler, scheduler and step count, each in a copy of ``task``."""

    task: Task
    samplers: Sequence[str]
    schedulers: Sequence[str]
    steps: Sequence[int]
    settings: Settings = ORACLE_SETTINGS
    inputs: Mapping[str, Any] = field(default_factory=dict)
    nodes: Sequence[Node] = NODES

    def tasks(self) -> list[Task]:
        """One for each sampler, scheduler and step count, in this order."""
        product = itertools.product(self.samplers, self.schedulers, self.steps)
        return [replace(self.task, sampler=a, scheduler=b, steps=c) for a, b, c in product]

    def run(self, node: Node, **changes: Any) -> OracleRun:
        """A guided run with the chosen settings."""
        return replace(OracleRun(node, self.settings, inputs=self.inputs), **changes)


def matrix_figure(runs: OracleRunner, choice: Choice) -> Iterator[Row]:
    """One row for each cell and node: what is left, the balance of the rest, the distance, and whether all is finite.

    Where ComfyUI or a node refuses a cell, the row's note says why.
    """
    wanted = {"unguided": UNGUIDED} | {node: choice.run(node) for node in choice.nodes}
    for task in progress(choice.tasks(), "matrix"):
        cell: Row = {"sampler": task.sampler, "scheduler": task.scheduler, "steps": task.steps}
        refused = cell | {"node": "all", **guided_columns(None, None), "note": ""}
        with refusal_noted(runs, refused):
            reports = runs.reports(task, wanted)
        if refused["note"]:
            yield refused
            continue
        for node in choice.nodes:
            yield cell | {"node": node, **guided_columns(reports["unguided"], reports[node]), "note": ""}


def guided_columns(unguided: Row | None, guided: Row | None) -> Row:
    """The figures of a guided run beside the unguided one's; None in place of what was not measured."""
    before, after = unguided or {}, guided or {}
    near, far = before.get("median_distance"), after.get("median_distance")
    return {
        "samples": after.get("samples"),
        "unguided": before.get("forbidden_share"),
        "left": after.get("forbidden_share"),
        "KL of the rest": after.get("kl_renormalised"),
        "KL unguided": before.get("kl_renormalised"),
        "distance ratio": far / near if near and far else None,
        "finite": after.get("finite"),
    }


@contextmanager
def refusal_noted(runs: OracleRunner, row: Row) -> Iterator[None]:
    """Note in a row why ComfyUI or a node refuses what is measured here; HeadlessError where the server has ended."""
    try:
        yield
    except HeadlessError as error:
        runs.check_alive()
        row["note"] = str(error).strip().splitlines()[-1].strip(" |")  # the last line is the node's own message


def progress(tasks: Sequence[Any], name: str) -> Iterable[Any]:
    """The tasks, with a progress bar if standard error is a terminal."""
    bar: Iterable[Any] = tqdm(tasks, desc=name, unit="cell", dynamic_ncols=True, disable=None)
    return bar


def nodes_agree(rows: Sequence[Row]) -> float:
    """The largest difference between the nodes of one cell in what is left."""
    shares: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if row["left"] is not None:
            shares.setdefault((row["sampler"], row["scheduler"], row["steps"]), []).append(row["left"])
    return max((max(values) - min(values) for values in shares.values()), default=0.0)


def columns_of(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """The (scheduler, steps) pairs, in the order in which they come."""
    return list(dict.fromkeys((row["scheduler"], row["steps"]) for row in rows))


def cells_of(rows: Sequence[Row], node: str) -> dict[str, dict[tuple[str, int], Row]]:
    """The rows of one node by sampler and column; a refused cell's row stands for every node."""
    cells: dict[str, dict[tuple[str, int], Row]] = {}
    for row in rows:
        if row["node"] in (node, "all"):
            cells.setdefault(row["sampler"], {})[row["scheduler"], row["steps"]] = row
    return cells


def matrix_table(rows: Sequence[Row], node: str) -> str:
    """What is left, in percent, as a Markdown table of samplers and schedulers, with each sampler's worst figures."""
    columns = columns_of(rows)
    several_steps = len({steps for _, steps in columns}) > 1
    heads = [f"{scheduler} {steps}" if several_steps else scheduler for scheduler, steps in columns]
    lines = [
        "| sampler | " + " | ".join(heads) + " | unguided | largest KL | distance ratio |",
        "| --- |" + " ---: |" * (len(heads) + 3),
    ]
    for sampler, cells in cells_of(rows, node).items():
        present = [row for row in cells.values() if row["left"] is not None]
        if not present:
            lines.append(f"| {sampler} | " + " | ".join("refused" for _ in columns) + " | | | |")
            continue
        shares = [percent(cells.get(column, {}).get("left")) for column in columns]
        ratios = [row["distance ratio"] for row in present if row["distance ratio"] is not None]
        worst = [
            f"{percent(min(r['unguided'] for r in present))} .. {percent(max(r['unguided'] for r in present))}",
            f"{max(r['KL of the rest'] for r in present if r['KL of the rest'] is not None):.3f}",
            f"{min(ratios):.2f} .. {max(ratios):.2f}",
        ]
        lines.append(f"| {sampler} | " + " | ".join([*shares, *worst]) + " |")
    return "\n".join(lines)


def percent(share: float | None) -> str:
    """A share in percent, or a dash."""
    return "–" if share is None else f"{100 * share:.1f}"
