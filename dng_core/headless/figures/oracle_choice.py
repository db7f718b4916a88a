"""What the arguments of ``dng figures`` ask an oracle figure to run over."""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ..errors import HeadlessError
from .oracle_runs import Task
from .sampler_matrix import NODES, SETTINGS, Choice

Name = TypeVar("Name", bound=str)


def chosen_by(
    args: argparse.Namespace,
    known: Mapping[str, Sequence[str]],
    samplers: Sequence[str],
    schedulers: Sequence[str],
    steps: Sequence[int],
) -> Choice:
    """What the arguments choose; the last three parameters are the defaults, and ("all",) stands for all.

    ``known``: ComfyUI's names (:meth:`OracleRunner.options`); raises HeadlessError for a name that is not among them.
    """
    prediction = {"v": "v_prediction"}.get(args.prediction, args.prediction)
    return Choice(
        Task(samples=args.samples, seed=args.seed, prediction=prediction),
        chosen("samplers", args.samplers or samplers, known["sampler_name"]),
        chosen("schedulers", args.schedulers or schedulers, known["scheduler"]),
        args.steps or steps,
        SETTINGS[args.settings],
        node_inputs(args.set),
        chosen("nodes", args.nodes or NODES, NODES),
    )


def chosen(option: str, wanted: Sequence[Name], known: Sequence[Name]) -> Sequence[Name]:
    """``wanted``, or all that are known; raises HeadlessError for a name that is not known."""
    if tuple(wanted) == ("all",):
        return known
    for name in wanted:
        if name not in known:
            raise HeadlessError(f"--{option} {name}: there is only {', '.join(known)}.")
    return wanted


def node_inputs(assignments: Sequence[str]) -> dict[str, Any]:
    """INPUT=VALUE pairs by name. Valid JSON is read as JSON, other values as text; HeadlessError for another form."""
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
