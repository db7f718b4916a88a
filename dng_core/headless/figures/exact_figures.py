"""The oracle's figures on model families, several concepts, step counts, references and unrelated concepts.

Each function yields the rows of a table, measured in a real ComfyUI. docs/samplers.md says what they show.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...baselines import NegativePrompting
from ...methods import MethodSettings
from .kept import Row
from .oracle_runs import ORACLE_SETTINGS, UNGUIDED, OracleRun, OracleRunner, Task
from .sampler_matrix import Choice, progress, refusal_noted

PREDICTIONS = ("epsilon", "v_prediction", "flow")
CFG_SCALES = (1.0, 3.0, 7.0)  # a choice
OFF = ORACLE_SETTINGS.with_(guidance_scale=0.0)
NP_SCALES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
"""Constant scales tried for negative prompting, from the weakest: a choice."""


def predictions_figure(runs: OracleRunner, choice: Choice) -> Iterator[Row]:
    """Flow and v oracles beside the epsilon one, and by how many standard errors they differ from it."""
    for task in progress(choice.tasks(), "predictions"):
        row: Row = {"sampler": task.sampler, "scheduler": task.scheduler, "steps": task.steps, "samples": task.samples}
        row |= {f"{p} {measure}": None for p in PREDICTIONS for measure in ("unguided", "left", "KL")}
        row |= {f"{p} standard errors": None for p in PREDICTIONS[1:]} | {"note": ""}
        with refusal_noted(runs, row):
            shares = {}
            for prediction in PREDICTIONS:
                reports = runs.reports(
                    replace(task, prediction=prediction), {"unguided": UNGUIDED, "dng": choice.run("ksampler")}
                )
                row[f"{prediction} unguided"] = reports["unguided"]["forbidden_share"]
                row[f"{prediction} left"] = shares[prediction] = reports["dng"]["forbidden_share"]
                row[f"{prediction} KL"] = reports["dng"]["kl_renormalised"]
            for prediction in PREDICTIONS[1:]:
                row[f"{prediction} standard errors"] = standard_errors(
                    shares["epsilon"], shares[prediction], task.samples
                )
        yield row


def standard_errors(a: float | None, b: float | None, samples: int) -> float | None:
    """How far two shares of ``samples`` each lie apart, in standard errors of their difference."""
    if a is None or b is None:
        return None
    pooled = (a + b) / 2
    error = math.sqrt(2 * pooled * (1 - pooled) / samples)
    return abs(a - b) / error if error else 0.0


def concepts_figure(runs: OracleRunner, choice: Choice) -> Iterator[Row]:
    """Two forbidden components of eight, as one node's list of concepts and as chained patches."""
    for cell in progress(choice.tasks(), "concepts"):
        task = replace(cell, forbidden="0,1")
        negative = ("0", "1")
        wanted = {
            "unguided": UNGUIDED,
            "list": choice.run("ksampler", negative=negative),
            "chained patches": choice.run("patch", negative=negative),
        }
        reports = runs.reports(task, wanted)
        for name, report in reports.items():
            errors = report.get("posterior_error") or [None, None]
            yield {
                "sampler": task.sampler,
                "steps": task.steps,
                "node": name,
                "samples": task.samples,
                "left 0": report["counts"][0] / task.samples,
                "left 1": report["counts"][1] / task.samples,
                "KL of the rest": report["kl_renormalised"],
                "error of posterior 0": errors[0],
                "error of posterior 1": errors[1],
            }


def step_counts_figure(runs: OracleRunner, choice: Choice) -> Iterator[Row]:
    """What the same settings leave at several step counts, and the spread of these shares."""
    by_sampler: dict[tuple[str, str], list[Task]] = {}
    for task in choice.tasks():
        by_sampler.setdefault((task.sampler, task.scheduler), []).append(task)
    for (sampler, scheduler), tasks in progress(list(by_sampler.items()), "step counts"):
        row: Row = {"sampler": sampler, "scheduler": scheduler, "samples": tasks[0].samples}
        row |= {f"{task.steps} steps": None for task in tasks} | {"spread": None, "note": ""}
        shares: list[float] = []
        with refusal_noted(runs, row):
            for task in tasks:
                report = runs.reports(task, {"dng": choice.run("ksampler")})["dng"]
                row[f"{task.steps} steps"] = report["forbidden_share"]
                shares.append(math.nan if report["forbidden_share"] is None else report["forbidden_share"])
            row["spread"] = max(shares) - min(shares)
        yield row


def references_figure(runs: OracleRunner, choice: Choice) -> Iterator[Row]:
    """What each reference leaves under CFG, where the undesired is a special case of the positive and where it is not.

    The prior is the undesired's share of what the positive asks for, which users can know. With "auto", its share of
    everything is tried too: the posterior is then exact for the image alone, wherever the reference is unconditional.
    """
    cases = {
        "positive: half, undesired: one of it": (
            {"kind": "components", "components": 8, "positive": "0,1,2,3", "forbidden": "0"},
            {"undesired alone": ("0", 1 / 8, 1 / 4)},
        ),
        "positive: A, undesired: B": (
            {"kind": "attributes", "components": 16, "positive": "A0", "forbidden": "B0"},
            {"undesired alone": ("B0", 1 / 4, 1 / 4), "joint": ("A0 B0", 1 / 16, 1 / 4)},
        ),
        "positive: rare A, which makes B likely": (
            {"kind": "correlated attributes", "components": 16, "positive": "A0", "forbidden": "B0"},
            {"undesired alone": ("B0", 0.0513, 1 / 3), "joint": ("A0 B0", 1 / 30, 1 / 3)},
        ),
    }
    tried = [(name, case, cell, cfg) for name, case in cases.items() for cell in choice.tasks() for cfg in CFG_SCALES]
    for name, (mixture, negatives), cell, cfg in progress(tried, "references"):
        task = replace(cell, cfg=cfg, **mixture)
        alone, of_all, of_positive = negatives["undesired alone"]
        joint, _, joint_prior = negatives.get("joint", negatives["undesired alone"])

        def guided(negative: str, prior: float, reference: str) -> OracleRun:
            return choice.run(
                "ksampler", settings=choice.settings.with_(prior=prior), negative=(negative,), reference=reference
            )

        wanted = {
            "unguided": UNGUIDED,
            "auto / alone": guided(alone, of_positive, "auto"),
            "auto / alone, prior of everything": guided(alone, of_all, "auto"),
            "positive / alone": guided(alone, of_positive, "positive"),
            "positive / joint": guided(joint, joint_prior, "positive"),
            "CFG mix / alone": guided(alone, of_positive, "cfg"),
        }
        reports = runs.reports(task, wanted)
        row: Row = {"case": name, "sampler": task.sampler, "steps": task.steps, "cfg": cfg, "samples": task.samples}
        row |= {label: report["forbidden_share"] for label, report in reports.items()}
        row["KL unguided"] = reports["unguided"]["kl_renormalised"]
        yield row | {"KL of the rest": reports["auto / alone"]["kl_renormalised"]}


def off_figure(runs: OracleRunner, choice: Choice) -> Iterator[Row]:
    """Whether each node at guidance scale 0 gives the stock sampler's samples, bit for bit."""
    wanted = {"unguided": UNGUIDED, "custom": OracleRun("stock guider")}
    for node in choice.nodes:
        wanted[node] = OracleRun(node, OFF, baseline="custom" if node == "guider" else "unguided")
    for task in progress(choice.tasks(), "off"):
        row: Row = {"sampler": task.sampler, "scheduler": task.scheduler, "steps": task.steps, "samples": task.samples}
        row |= {node: None for node in choice.nodes} | {"note": ""}
        with refusal_noted(runs, row):
            reports = runs.reports(task, wanted)
            row |= {node: "identical" if reports[node]["identical"] else "DIFFERS" for node in choice.nodes}
        yield row


def unrelated_figure(runs: OracleRunner, choice: Choice) -> Iterator[Row]:
    """A concept of the positive's own topic and one of a topic far away, by DNG and by a constant negative prompt.

    The constant prompt stands at the smallest of :data:`NP_SCALES` that leaves no more of the related concept than DNG
    does. Both methods then avoid the unrelated concept from the same seeds, and their changes are compared.
    """
    topics: dict[str, Any] = {"kind": "topics", "components": 8, "positive": "0,1,2,3"}
    for cell in progress(choice.tasks(), "unrelated"):
        related, unrelated = (replace(cell, forbidden=component, **topics) for component in ("0", "4"))
        target = _avoided(runs, choice, related)
        tried = ((scale, _avoided(runs, choice, related, scale)) for scale in NP_SCALES)
        enough = ((scale, report) for scale, report in tried if _share(report) <= _share(target))
        scale, constant = next(enough, (math.nan, None))
        for name, np_scale, of_related in (("DNG", None, target), ("constant", scale, constant)):
            if of_related is None:
                continue
            far = _avoided(runs, choice, unrelated, np_scale)
            fallen = _first_below(far["mean_scale"][0], 0.01) if np_scale is None else "never"
            yield {
                "sampler": cell.sampler,
                "steps": cell.steps,
                "method": name,
                "scale": np_scale,
                "samples": cell.samples,
                "related left": of_related["forbidden_share"],
                "related KL": of_related["kl_renormalised"],
                "unrelated: RMS change": far["rms_change"],
                "mean scale falls below 0.01 at": fallen,
            }


def _avoided(runs: OracleRunner, choice: Choice, task: Task, np_scale: float | None = None) -> Row:
    """The report of avoiding what a task forbids, by DNG or by a constant scale. The prior is 1/4, for one of four."""
    settings: MethodSettings = choice.settings.with_(prior=1 / 4)
    if np_scale is not None:
        settings = NegativePrompting(guidance_scale=np_scale)
    run = choice.run("ksampler", settings=settings, negative=(task.forbidden,), baseline="unguided")
    return runs.reports(task, {"unguided": UNGUIDED, "guided": run})["guided"]


def _share(report: Row) -> float:
    """What is left; infinite where the samples are broken."""
    share = report["forbidden_share"]
    return math.inf if share is None else float(share)


def _first_below(values: list[float], limit: float) -> str:
    """The share of the run after which ``values`` stay below ``limit``, as text."""
    last = max((i for i, value in enumerate(values) if value >= limit), default=-1)
    return "never" if last + 1 == len(values) else f"{(last + 1) / len(values):.0%} of the steps"
