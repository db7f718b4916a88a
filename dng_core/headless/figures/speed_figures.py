"""What it takes to avoid something in a real ComfyUI: by DNG, by a negative prompt, and by ComfyUI's other nodes."""

import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from ..client import run_workflow
from ..errors import HeadlessError
from ..memory import begin_peak, peak_bytes
from ..server import Server
from ..workflow import Prompt
from .kept import Row
from .speed_prompts import NEGATIVE_PROMPT, WAYS, Sampling, Subject, Way, speed_prompt


@dataclass(frozen=True)
class Run:
    """What one run took: predictions and seconds (of the sampler's node) of all images, and the server's peak memory.

    ``peak``: bytes; None where the system does not tell. ``digest``: of the samples, by which they are known.
    """

    predictions: int
    seconds: float
    peak: int | None
    digest: str
    finite: bool


@dataclass
class Speeds:
    """What was measured of a subject: a row for each way, and why other ways have none."""

    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def measure_speeds(server: Server, subject: Subject, images: int, steps: int, repeats: int, seed: int) -> Speeds:
    """All ways with the same steps and seeds, in turns of random order, after one untimed turn.

    A way of other nodes than the stock KSampler and DNG's is left out where they refuse the model, take no notice of
    it, or break its pictures. Raises HeadlessError where the stock KSampler or DNG fails.
    """
    speeds, order = Speeds(), random.Random(seed)
    ways: list[Way] = []
    for way in WAYS:
        if reason := _refusal(server, subject, way, Sampling(seed, steps)):
            speeds.left_out.append(f"{subject.name}: {way.name} is left out: {reason}")
        else:
            ways.append(way)
    taken: dict[Way, list[Run]] = {way: [] for way in ways}
    for turn in tqdm(range(1, repeats + 1), desc=subject.name, disable=None):
        for way in order.sample(ways, len(ways)):
            taken[way].append(_run(server, speed_prompt(subject, way, Sampling(seed + turn, steps))))
    speeds.rows = list(_rows(subject, taken, images))
    return speeds


def _refusal(server: Server, subject: Subject, way: Way, sampling: Sampling) -> str:
    """Why a way cannot be measured on a subject; "" if it can. It runs once, or twice if its effect is in doubt."""
    if way.of_prompts and not subject.prompted:
        return "there is no prompt, across whose direction it pushes"  # it would divide by zero, or by rounding errors
    prompt = speed_prompt(subject, way, sampling)
    if way.without_effect is None:
        if not _run(server, prompt).finite:
            raise HeadlessError(f"{subject.name}: {way.name} draws numbers that are not finite.")
        return ""
    try:
        run = _run(server, prompt)
        node, name, value = way.without_effect
        prompt[node]["inputs"][name] = value
        same = run.finite and _run(server, prompt).digest == run.digest
    except HeadlessError as error:
        server.check_alive()
        lines = error.problem.splitlines()
        return " ".join(dict.fromkeys([lines[0], lines[-1].strip()]))
    if not run.finite:
        return "it draws numbers that are not finite"
    return "the model takes no notice of it" if same else ""


def _run(server: Server, prompt: Prompt) -> Run:
    if server.process is None:
        raise ValueError("only a server that was started here tells what it takes")
    begin_peak(server.process.pid)
    result = run_workflow(server, prompt)
    peak, report = peak_bytes(server.process.pid), result.ui["report"]["bench"][0]
    return Run(report["predictions"], result.node_seconds["sampler"], peak, report["digest"], report["finite"])


def _rows(subject: Subject, taken: dict[Way, list[Run]], images: int) -> Iterator[Row]:
    stock = [run.seconds for run in taken[NEGATIVE_PROMPT]]
    for way, runs in taken.items():
        ratios = [run.seconds / seconds for run, seconds in zip(runs, stock, strict=True)]
        peaks = [run.peak for run in runs if run.peak is not None]
        yield {
            "model": subject.model,
            "avoided": subject.avoided,
            "node": way.name,
            "cfg": way.cfg,
            "predictions an image": statistics.mean(run.predictions for run in runs) / images,
            "seconds an image (median)": statistics.median(run.seconds for run in runs) / images,
            "against a negative prompt (median)": "" if way is NEGATIVE_PROMPT else _interval(ratios),
            "peak memory, MB": round(statistics.median(peaks) / 1e6) if peaks else "",
        }


def _interval(ratios: Sequence[float]) -> str:
    """The median with an interval of at least 95 % that assumes nothing of the distribution (of the order)."""
    ordered, count = sorted(ratios), len(ratios)
    below, tail = 0, 2.0**-count
    while tail + math.comb(count, below + 1) * 2.0**-count <= 0.025:
        below += 1
        tail += math.comb(count, below) * 2.0**-count
    return f"{statistics.median(ratios):.2f} x ({ordered[below]:.2f} .. {ordered[-1 - below]:.2f})"
