"""What the pack costs a user of ComfyUI: seconds at its start, and what the live chart adds to a run."""

import asyncio
import contextlib
import json
import math
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from scipy.stats import t

from ..errors import HeadlessError
from ..locate import Location, has_accelerator
from ..process import run_helper
from ..server import LOG_TAIL_LINES, PACK_NAME, Server, server_options, visible_pack

CHART_EVENT = "dynamic_negative_guidance.chart"
CLIENT = "dng-figures"
STEPS = 30  # like the numbers below, a choice
POLL_SECONDS = 0.25  # between looks at ComfyUI's history
IMPORT_SECONDS = re.compile(rf"([\d.]+) seconds: .*{PACK_NAME}")
RUN_SECONDS = 600  # a run that takes longer counts as hanging


@dataclass(frozen=True)
class Cost:
    """What a start or a run takes: seconds by the clock and seconds of the processor.

    ``own``: the part of the clock's seconds that the pack itself took. For a start, it is the pack's import time from
    ComfyUI's log. For a run, it is the time spent in the live chart, from the chart's last message.
    """

    seconds: float
    cpu_seconds: float
    own: float


def start_figure(location: Location, pack: Path, repeats: int) -> Iterator[dict[str, Any]]:
    """The time until ComfyUI could answer, without and with the pack in turns, after one untimed turn of each."""
    device = [] if has_accelerator(location) else ["--cpu"]
    costs: dict[str, list[Cost]] = {"without the pack": [], "with the pack": []}
    for turn in range(repeats + 1):
        for name, given in zip(costs, (None, pack), strict=True):
            cost = _start(location, given, device)
            costs[name] += [cost] if turn else []
    yield from _rows("start of ComfyUI", costs, "import, by ComfyUI's log")


def _start(location: Location, pack: Path | None, device: list[str]) -> Cost:
    """What one start takes. ComfyUI's log gives the pack's part to a tenth of a second."""
    with tempfile.TemporaryDirectory(prefix="dng-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        arguments = [str(location.path / "main.py"), *server_options(folder, None), *device, "--quick-test-for-ci"]
        with contextlib.ExitStack() as stack:
            options = ["--disable-all-custom-nodes"]
            if pack is not None:
                options = stack.enter_context(visible_pack(location, pack, folder, all_custom_nodes=False))
            began, cpu = time.perf_counter(), _children_seconds()
            status, lines = run_helper(location.python, [*arguments, *options])
            taken, cpu = time.perf_counter() - began, _children_seconds() - cpu
    found = next(filter(None, map(IMPORT_SECONDS.search, lines)), None)
    if status or (pack is not None and found is None):
        raise HeadlessError("ComfyUI did not start with the pack. Its log:\n" + "\n".join(lines[-LOG_TAIL_LINES:]))
    return Cost(taken, cpu, float(found[1]) if found else 0.0)


def _children_seconds() -> float:
    """The processor's seconds for all programs that were started here and have ended."""
    times = os.times()
    return times.children_user + times.children_system


def live_chart_figure(server: Server, images: int, repeats: int) -> Iterator[dict[str, Any]]:
    """The same MNIST run with and without a browser that is sent the live chart, in turns, after an untimed turn.

    One client watches both runs, and ComfyUI sends it the progress of both. Only a run that this client queued has a
    chart. The time is what ComfyUI notes between the start and the end of the run.
    """
    costs = asyncio.run(_live_chart_runs(server, images, repeats))
    yield from _rows("30-step run", costs, "in the chart")


async def _live_chart_runs(server: Server, images: int, repeats: int) -> dict[str, list[Cost]]:
    costs: dict[str, list[Cost]] = {"without the chart": [], "with the chart": []}
    async with aiohttp.ClientSession(server.url) as session:
        for turn in range(repeats + 1):
            for ours, name in sorted(enumerate(costs), reverse=bool(turn % 2)):
                prompt = mnist_prompt(2 * turn + ours, images)
                cost = await asyncio.wait_for(_run(server, session, prompt, bool(ours)), RUN_SECONDS)
                costs[name] += [cost] if turn else []
    return costs


async def _run(server: Server, session: aiohttp.ClientSession, prompt: dict[str, Any], ours: bool) -> Cost:
    """What the run takes from its start to its end, and the part of it that is spent in the chart."""
    if server.process is None:
        raise ValueError("only a server that was started here tells what it takes")
    process = psutil.Process(server.process.pid)
    in_chart = [0.0]

    async def listen(socket: aiohttp.ClientWebSocketResponse) -> None:
        async for message in socket:
            if message.type == aiohttp.WSMsgType.TEXT and (event := json.loads(message.data))["type"] == CHART_EVENT:
                in_chart.append(event["data"]["seconds"])

    async with session.ws_connect(f"/ws?clientId={CLIENT}", max_msg_size=0) as socket:
        listener = asyncio.create_task(listen(socket))
        cpu = sum(process.cpu_times()[:2])
        body = {"prompt": prompt, **({"client_id": CLIENT} if ours else {})}
        async with session.post("/prompt", json=body) as answer:
            if answer.status != 200:
                raise HeadlessError(f"ComfyUI refuses the run: {await answer.text()}")
            number = (await answer.json())["prompt_id"]
        entry = None
        while entry is None:
            await asyncio.sleep(POLL_SECONDS)
            server_said = await (await session.get(f"/history/{number}")).json()
            entry = server_said.get(number)
        cpu = sum(process.cpu_times()[:2]) - cpu
        listener.cancel()
    if entry["status"]["status_str"] != "success":
        raise HeadlessError(f"The run failed: {entry['status']['messages']}")
    at = {event: data["timestamp"] / 1000 for event, data in entry["status"]["messages"]}
    return Cost(at["execution_success"] - at["execution_start"], cpu, in_chart[-1])


def mnist_prompt(seed: int, images: int) -> dict[str, Any]:
    """KSampler (DNG) on the shipped MNIST model. Each run needs a new seed: ComfyUI caches used ones."""
    sampling = {"steps": STEPS, "cfg": 1.0, "sampler_name": "euler_ancestral", "scheduler": "normal", "denoise": 1.0}
    wires = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    return {
        "1": {"class_type": "DNGLoadPixelModel", "inputs": {"name": "mnist"}},
        "2": {"class_type": "DNGClassLabel", "inputs": {"model": ["1", 0], "label": "none"}},
        "3": {"class_type": "DNGClassLabel", "inputs": {"model": ["1", 0], "label": "0"}},
        "4": {"class_type": "DNGEmptyPixelLatent", "inputs": {"model": ["1", 0], "batch_size": images}},
        "5": {"class_type": "KSamplerDNG", "inputs": {**wires, **sampling, "seed": seed}},
        "6": {"class_type": "DNGPixelLatentToImage", "inputs": {"samples": ["5", 0], "upscale": 1}},
        "7": {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}},
    }


def _rows(what: str, costs: dict[str, list[Cost]], own: str) -> Iterator[dict[str, Any]]:
    """A row for each way to run. The second also has the differences within each turn and the pack's share."""
    first = next(iter(costs.values()))
    for name, taken in costs.items():
        row: dict[str, Any] = {what: name, "turns": len(taken)}
        row["seconds (median)"] = seconds = statistics.median(cost.seconds for cost in taken)
        pairs = list(zip(taken, first, strict=True))
        added = taken is not first
        row["added, s"] = _added([(cost.seconds, before.seconds) for cost, before in pairs]) if added else ""
        row["added CPU, s"] = (
            _added([(cost.cpu_seconds, before.cpu_seconds) for cost, before in pairs]) if added else ""
        )
        spent = statistics.median(cost.own for cost in taken)
        yield row | {own: f"{spent:.4f} s ({100 * spent / seconds:.2f} %)" if added else ""}


def _added(pairs: list[tuple[float, float]]) -> str:
    """The mean difference over the turns with its 95 % interval (Student's t), and the same in percent."""
    differences = np.array([taken - before for taken, before in pairs])
    mean = differences.mean()
    half = t.ppf(0.975, len(pairs) - 1) * differences.std(ddof=1) / len(pairs) ** 0.5 if len(pairs) > 1 else math.nan
    percent = 100 / float(np.mean([before for _, before in pairs]))
    return f"{mean:+.3f} ± {half:.3f} ({mean * percent:+.1f} ± {half * percent:.1f} %)"
