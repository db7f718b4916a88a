"""Figures 4 and 5: workflows sent to a real ComfyUI."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..client import run_workflow
from ..server import Server
from .kept import Kept
from .oracle_runs import UNGUIDED, OracleRun, OracleRunner, Task

DIGITS = 10
NP_SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
"""Scales tried for negative prompting, from the weakest; like the numbers below, a choice."""
NP_TRIAL_IMAGES = 128
NP_FIRST_TRIAL = 3  # index of the scale that is tried first


def oracle_figure(runs: OracleRunner, samples: int, seed: int) -> Iterator[dict[str, Any]]:
    """Figure 4: ``euler_ancestral`` on the oracle in ComfyUI, at the oracle's settings, through both nodes."""
    for steps in (30, 100):
        reports = runs.reports(
            Task(steps=steps, samples=samples, seed=seed),
            {"unguided": UNGUIDED, "ksampler": OracleRun("ksampler"), "patch": OracleRun("patch")},
        )
        for node in ("ksampler", "patch"):
            yield {
                "steps": steps,
                "node": node,
                "samples": samples,
                "unguided": reports["unguided"]["forbidden_share"],
                "DNG": reports[node]["forbidden_share"],
                "KL of the rest": reports[node]["kl_renormalised"],
            }


def mnist_figure(server: Server, workflow: Path, images: int, cache: Path) -> Iterator[dict[str, Any]]:
    """Figure 5: the shipped workflow, at its own settings, removes each digit: first with DNG, then with NP.

    NP, negative prompting, stands at the smallest scale of a grid that leaves no more of the digit than DNG does. A
    search with few images finds that scale. If it leaves more with all images, the next larger scales are tried. Runs
    are kept in the JSON file ``cache``, so that a stopped figure goes on where it was.
    """
    shipped = json.loads(workflow.read_text(encoding="utf-8"))
    kept = Kept(cache)

    def rows(digit: int, count: int, method: str, scale: float = 0.0) -> dict[str, Any]:
        prompt = class_removal_prompt(shipped, digit, count, method, scale)

        def measure() -> list[dict[str, Any]]:
            result = run_workflow(server, prompt, progress=True)
            return max((ui["figures"] for ui in result.ui.values() if "figures" in ui), key=len)

        unguided, guided = kept.get(json.dumps(prompt, sort_keys=True), measure)
        return {**guided, "unguided": unguided}

    left = {}
    for digit in range(DIGITS):
        dng = rows(digit, images, "DNG")
        left[digit] = dng["forbidden_share"]
        yield {"digit": digit, "method": "unguided", "NP scale": "", **_columns(dng["unguided"])}
        yield {"digit": digit, "method": "DNG", "NP scale": "", **_columns(dng)}
    for digit in range(DIGITS):
        for index in range(_trial_scale(rows, digit, left[digit]), len(NP_SCALES)):
            np = rows(digit, images, "NP", NP_SCALES[index])
            if np["forbidden_share"] <= left[digit] or index + 1 == len(NP_SCALES):
                yield {"digit": digit, "method": "NP", "NP scale": NP_SCALES[index], **_columns(np)}
                break


def _trial_scale(rows: Any, digit: int, share: float) -> int:
    """Index of the smallest scale that leaves at most ``share`` of the digit, from few images."""
    index = NP_FIRST_TRIAL

    def safe(index: int) -> bool:
        return bool(rows(digit, NP_TRIAL_IMAGES, "NP", NP_SCALES[index])["forbidden_share"] <= share)

    if safe(index):
        while index > 0 and safe(index - 1):
            index -= 1
        return index
    while index + 1 < len(NP_SCALES):
        index += 1
        if safe(index):
            break
    return index


def class_removal_prompt(
    shipped: dict[str, Any], digit: int, images: int, method: str, scale: float
) -> dict[str, Any]:
    """The shipped workflow for another digit and batch size, with the unguided and one other method's report."""
    prompt = copy.deepcopy(shipped)
    by_class: dict[str, list[str]] = {}
    for key, node in prompt.items():
        by_class.setdefault(node["class_type"], []).append(key)
    negative = prompt[by_class["KSamplerDNG"][0]]["inputs"]["negative"][0]
    prompt[negative]["inputs"]["label"] = str(digit)
    prompt[by_class["DNGEmptyPixelLatent"][0]]["inputs"]["batch_size"] = images
    for key in (*by_class["SaveImage"], *by_class["PreviewAny"]):
        del prompt[key]

    reports = {_sampler_of(prompt, key): key for key in by_class["DNGClassReport"]}
    np_sampler = next(k for k in by_class["KSampler"] if prompt[k]["inputs"]["negative"][0] == negative)
    unguided = next(k for k in by_class["KSampler"] if k != np_sampler)
    kept, dropped = by_class["KSamplerDNG"][0], np_sampler
    if method == "NP":
        kept, dropped = dropped, kept
        prompt[kept]["inputs"]["cfg"] = 1.0 + scale
    del prompt[reports[dropped]]
    prompt[reports[kept]]["inputs"]["previous"] = [reports[unguided], 0]
    return prompt


def _sampler_of(prompt: dict[str, Any], report: str) -> str:
    images: str = prompt[report]["inputs"]["images"][0]
    sampler: str = prompt[images]["inputs"]["samples"][0]
    return sampler


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    names = {
        "images": "images",
        "forbidden_share": "left",
        "kl_renormalised": "KL of the rest",
        "kl": "KL, paper's form",
        "kept": "class kept",
        "rms_change": "RMS change",
    }
    return {title: row[name] for name, title in names.items()}
