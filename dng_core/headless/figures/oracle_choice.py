"""What the arguments of ``dng figures`` ask an oracle figure to run over."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import HeadlessError
from . import exact_figures
from .oracle_runs import REFUSED, OracleRunner, Task
from .sampler_matrix import NODES, SETTINGS, Choice, Row, matrix_figure

ALL = ("all",)
Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class Figure:
    """The rows of a figure, and what it runs over unless the arguments say otherwise."""

    rows: Callable[[OracleRunner, Choice], Iterator[Row]]
    samplers: Sequence[str] = ALL
    schedulers: Sequence[str] = ("karras",)
    steps: Sequence[int] = (30,)


FIGURES = {
    "matrix": Figure(matrix_figure, schedulers=ALL),
    "predictions": Figure(exact_figures.predictions_figure),
    "concepts": Figure(exact_figures.concepts_figure, samplers=("euler_ancestral", "dpmpp_2m_sde", "dpmpp_2m")),
    "step-counts": Figure(exact_figures.step_counts_figure, steps=(15, 30, 60, 250)),
    "references": Figure(exact_figures.references_figure, samplers=("euler_ancestral",)),
    "off": Figure(exact_figures.off_figure, steps=(8,)),
    "unrelated": Figure(exact_figures.unrelated_figure, samplers=("euler_ancestral",)),
}


def oracle_rows(args: argparse.Namespace, samples: int, runs: OracleRunner) -> Iterator[Row]:
    """The rows of the figure that the arguments name; raises HeadlessError for a name that ComfyUI does not have."""
    figure = FIGURES[args.figure]
    known = runs.options()
    samplers, schedulers = known["sampler_name"], known["scheduler"]
    if args.figure != "matrix":
        samplers = [name for name in samplers if name not in REFUSED]
    prediction = {"v": "v_prediction"}.get(args.prediction, args.prediction)
    choice = Choice(
        Task(samples=samples, seed=args.seed, prediction=prediction),
        chosen("samplers", args.samplers or figure.samplers, samplers),
        chosen("schedulers", args.schedulers or figure.schedulers, schedulers),
        args.steps or figure.steps,
        SETTINGS[args.settings],
        node_inputs(args.set),
        chosen("nodes", args.nodes or NODES, NODES),
    )
    return figure.rows(runs, choice)


def chosen(option: str, wanted: Sequence[Name], known: Sequence[Name]) -> Sequence[Name]:
    """``wanted``, or all that are known; raises HeadlessError for a name that is not."""
    if wanted == ALL:
        return known
    for name in wanted:
        if name not in known:
            raise HeadlessError(f"--{option} {name}: for this figure there is {', '.join(known)}.")
    return wanted


def node_inputs(assignments: Sequence[str]) -> dict[str, Any]:
    """INPUT=VALUE pairs by name, values read as JSON where they are that; raises HeadlessError for another form."""
    inputs = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not (name and equals):
            raise HeadlessError(f"--set {assignment}: the form is INPUT=VALUE, for example temperature=0.5.")
        try:
            inputs[name] = json.loads(text)
        except ValueError:
            inputs[name] = text
    return inputs
