"""What `economy` leaves out on the oracle in a real ComfyUI, and what that changes, image by image."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..errors import HeadlessError
from ..workflow import Prompt
from .kept import Row
from .oracle_runs import OracleRunner, Task, oracle_prompt
from .sampler_matrix import Choice, percent, progress, refusal_noted

BATCHES = (1, 16)  # a choice: an image that sleeps on its own, and a batch in which one that is awake wakes all
MOST_SAMPLES = 4096  # that ComfyUI's RebatchLatents puts together
TOPICS: dict[str, Any] = {"kind": "topics", "positive": "0,1,2,3", "cfg": 5.0}
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "one of 8": ({}, 1 / 8),
    "related, cfg 5": (TOPICS | {"forbidden": "0"}, 1 / 4),
    "unrelated, cfg 5": (TOPICS | {"forbidden": "4"}, 1 / 4),
}
"""What is drawn and avoided, as changes of the task, and the prior. The last two are those of two topics far apart."""

AVOIDED_DIGIT = "0"  # a choice
CALIBRATED_SCALE = 3.0  # the default of the nodes for calibrated settings


def economy_figure(runs: OracleRunner, choice: Choice, batches: Sequence[int]) -> Iterator[Row]:
    """A row for each case, sampler, step count and batch size: `economy` off and auto with the same seeds.

    Every batch is a run of its own, with a seed of its own. The two topics are drawn by the first sampler alone.
    """
    cells = [
        (case, task, batch)
        for case in CASES
        for task in choice.tasks()
        for batch in batches
        if not CASES[case][0] or task.sampler == choice.samplers[0]
    ]
    for case, cell, batch in progress(cells, "economy"):
        changes, prior = CASES[case]
        task = replace(cell, samples=images_in_runs(cell.samples, batch), **changes)
        row: Row = {"case": case, "sampler": task.sampler, "steps": task.steps, "batch": batch}
        row |= {"samples": task.samples, **economy_columns(None, None), "note": ""}
        settings = choice.settings.with_(prior=prior)
        guided = choice.run("ksampler", settings=settings, negative=(task.forbidden,))
        with refusal_noted(runs, row):
            names = ("off", "auto")
            wanted = {name: replace(guided, inputs={**guided.inputs, "economy": name}) for name in names}
            wanted["auto"] = replace(wanted["auto"], baseline="off")
            prompt = in_batches(oracle_prompt(task, wanted), wanted, task, batch)
            of = runs.figures(prompt, [f"{name} {what}" for name in names for what in ("report", "looks")])
            row |= economy_columns(of[0] | of[1], of[2] | of[3])
        yield row


def in_batches(prompt: Prompt, runs: Iterable[str], task: Task, batch: int) -> Prompt:
    """The prompt of a task, drawn in as many runs of ``batch`` samples as it takes, each with a seed of its own.

    The node "NAME looks" reports how many undesired predictions the runs of NAME evaluated, all together.
    """
    prompt["latent"]["inputs"]["batch_size"] = batch
    prompt |= _seeds(task.seed, task.samples // batch)
    for name in runs:
        prompt |= _put_together(prompt, name, task.samples) | _looks(name)
        report = prompt[f"{name} report"]["inputs"]
        del report["trace"]
        report["samples"] = [f"{name} all", 0]
        if "baseline" in report:
            report["baseline"] = [f"{report['baseline'][0]} all", 0]
    return prompt


def _seeds(first: int, runs: int) -> Prompt:
    return {"seeds": _node("DNGBenchSeeds", first=first, runs=runs)}


def _put_together(prompt: Prompt, name: str, samples: int) -> Prompt:
    """The node "NAME all": the samples of all runs of the sampler NAME, which takes each of the seeds in turn."""
    prompt[name]["inputs"]["seed"] = ["seeds", 0]
    return {f"{name} all": _node("RebatchLatents", latents=[name, 0], batch_size=samples)}


def _looks(name: str) -> Prompt:
    return {f"{name} looks": _node("DNGBenchLooks", traces=[name, 1])}


def economy_columns(off: Row | None, auto: Row | None) -> Row:
    """The figures of two runs with the same seeds; None in place of what was not measured."""
    before, after = off or {}, auto or {}
    row: Row = {f"left {name}": of.get("forbidden_share") for name, of in (("off", before), ("auto", after))}
    row["difference, points"] = None if auto is None else paired_difference(auto)
    row |= {f"KL {name}": of.get("kl_renormalised") for name, of in (("off", before), ("auto", after))}
    row |= {f"distance {name}": of.get("median_distance") for name, of in (("off", before), ("auto", after))}
    return row | {"evaluated": evaluated(off, auto) if off and auto else None}


def paired_difference(report: Row) -> str:
    """By how much more is left than in the baseline, with its 95 % interval, in points.

    The same image was drawn twice. Images that are left both times, or neither time, add nothing to the variance
    (McNemar's test).
    """
    count, gained, lost = report["samples"], report["forbidden_gained"], report["forbidden_lost"]
    difference = (gained - lost) / count
    error = math.sqrt(max(gained + lost - count * difference**2, 0)) / count
    return f"{100 * difference:+.2f} ± {196 * error:.2f}"


def economy_mnist_figure(
    runs: OracleRunner, model: str, images: int, steps: int, seed: int, batches: Sequence[int]
) -> Iterator[Row]:
    """The same on a network of MNIST by its calibration: a row for each batch size.

    "Same class": of the images that do not show the digit with `economy` off, the share that *auto* draws as the same
    digit. "Kept" is the same share between the images without guidance and those with it.
    """
    for batch in batches:
        count = images_in_runs(images, batch)
        prompt = mnist_prompt(model, count, steps, seed, batch)
        nodes = ["unguided report", "off report", "auto report", "off beside auto", "off looks", "auto looks"]
        unguided, off, auto, both, looks, fewer = runs.figures(prompt, nodes)
        row: Row = {"model": model, "avoided": AVOIDED_DIGIT, "steps": steps, "batch": batch, "images": count}
        for name, of in (("unguided", unguided), ("off", off), ("auto", auto)):
            low, high = percent(of["forbidden_low"]), percent(of["forbidden_high"])
            row[f"left {name}, %"] = f"{percent(of['forbidden_share'])} ({low} .. {high})"
        row |= {f"kept {name}, %": percent(of["kept"]) for name, of in (("off", off), ("auto", auto))}
        row |= {f"KL {name}": of["kl_renormalised"] for name, of in (("off", off), ("auto", auto))}
        yield row | {"same class, %": percent(both["kept"]), "evaluated": evaluated(looks, fewer)}


def mnist_prompt(model: str, images: int, steps: int, seed: int, batch: int) -> Prompt:
    """Digits of a pixel model, away from one, by its calibration with `economy` off and auto, and without guidance."""
    prompt: Prompt = {
        "model": _node("DNGLoadPixelModel", name=model),
        "any": _node("DNGClassLabel", model=["model", 0], label="none"),
        "avoided": _node("DNGClassLabel", model=["model", 0], label=AVOIDED_DIGIT),
        "latent": _node("DNGEmptyPixelLatent", model=["model", 0], batch_size=batch),
        "calibration": _node("DNGLoadCalibration", name=f"shipped: {model}"),
        **_seeds(seed, images // batch),
    }
    sampling = {
        "model": ["model", 0], "positive": ["any", 0], "latent_image": ["latent", 0], "cfg": 1.0, "denoise": 1.0,
        "steps": steps, "sampler_name": "euler_ancestral", "scheduler": "normal",
    }  # fmt: skip
    prompt["unguided"] = _node("KSampler", **sampling, negative=["any", 0])
    settings = {"guidance_scale": CALIBRATED_SCALE, "prior": 1 / 10, "calibration": ["calibration", 0]}
    for economy in ("off", "auto"):
        given = {f"settings.{name}": value for name, value in {**settings, "economy": economy}.items()}
        prompt[economy] = _node("KSamplerDNG", **sampling, negative=["avoided", 0], settings="custom", **given)
        prompt |= _looks(economy)
    for name in ("unguided", "off", "auto"):
        prompt |= _put_together(prompt, name, images)
        prompt[f"{name} images"] = _node("DNGPixelLatentToImage", samples=[f"{name} all", 0], upscale=1)
        prompt[f"{name} report"] = _class_report(name, name, "unguided")
    prompt["off beside auto"] = _class_report("auto beside off", "auto", "off")
    return prompt


def _class_report(title: str, images: str, baseline: str) -> dict[str, Any]:
    wires = {"images": [f"{images} images", 0], "baseline": [f"{baseline} images", 0]}
    return _node("DNGClassReport", name=title, classifier="mnist", forbidden=AVOIDED_DIGIT, **wires)


def images_in_runs(images: int, batch: int) -> int:
    """At least ``images``, as a multiple of ``batch``. Raises HeadlessError where ComfyUI cannot put them together."""
    count = math.ceil(images / batch) * batch
    if count > MOST_SAMPLES:
        raise HeadlessError(f"--samples {images}: the figures on economy take {MOST_SAMPLES} at most.")
    return count


def evaluated(off: Row, auto: Row) -> str:
    """The share of the undesired predictions of `economy` off that *auto* evaluates."""
    return f"{percent(auto['made'] / off['made'])} %"


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}
