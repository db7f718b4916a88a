"""Draws many batches of images: in this process, over this machine's cores and GPUs, or on a Ray cluster.

Workers only draw. What they draw comes back to the caller, who alone writes to the cache.
"""

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from ..models.devices import devices
from .class_removal import Batch, Drawn, Point, draw_batch

EngineName = Literal["local", "ray"]
ENGINES: tuple[EngineName, ...] = ("local", "ray")
PACKAGE = Path(__file__).resolve().parents[1]
PARENT_SECONDS = 1.0  # how often a process looks whether its parent still runs: a choice
RAY_RETRIES = 3  # of a batch whose worker died: a choice


@dataclass(frozen=True)
class Workers:
    """What draws.

    Parameters
    ----------
    engine: "local" for joblib's processes, "ray" for a cluster.
    jobs: how many processes there are ("local"; 0 stands for one per GPU, or one per two cores without a GPU), or how
        many batches are in flight ("ray"; 0 stands for two per GPU, or two per core without one).
    device: "auto", "cpu" or "cuda"; several GPUs are taken in turn.
    address: where the Ray cluster is; None starts one on this machine.
    """

    engine: EngineName = "local"
    jobs: int = 0
    device: str = "auto"
    address: str | None = None

    def __post_init__(self) -> None:
        if self.jobs < 0:
            raise ValueError(f"--jobs must be 0 or more, not {self.jobs}")

    def count(self) -> int:
        """How many batches are drawn side by side."""
        gpus = [device for device in self.devices() if device != "cpu"]
        return self.jobs or len(gpus) or max(1, (os.cpu_count() or 2) // 2)

    def devices(self) -> list[str]:
        """The devices that batches are drawn on, in turn."""
        return devices(self.device)


def draw_all(batches: Sequence[Batch], workers: Workers) -> Iterator[tuple[Batch, Drawn | Exception]]:
    """Draw batches, in the order in which they are done.

    A batch that cannot be drawn comes with its error. The other batches of its point are then left out.

    Raises
    ------
    ValueError: if joblib or Ray is needed and not installed, or Ray does not start.
    ChildProcessError: if a process of joblib dies.
    """
    devices = workers.devices()
    jobs = min(workers.count(), len(batches))
    failed: set[Point] = set()
    tasks = ((b, devices[i % len(devices)]) for i, b in enumerate(batches) if b.point not in failed)
    if workers.engine == "ray":
        drawing = _on_ray(tasks, workers)
    elif jobs <= 1:
        drawing = ((batch, draw_one(batch, device, None)) for batch, device in tasks)
    else:
        drawing = _on_processes(tasks, jobs)
    for batch, drawn in drawing:
        if batch.point in failed:
            continue
        if isinstance(drawn, Exception):
            failed.add(batch.point)
        yield batch, drawn


def draw_one(batch: Batch, device: str, threads: int | None) -> Drawn | Exception:
    """Draw one batch with ``threads`` CPU threads. An error is returned, not raised, so that other batches go on."""
    if threads:
        torch.set_num_threads(threads)
    began = time.monotonic()
    try:
        return replace(draw_batch(batch, device), seconds=time.monotonic() - began)
    except (ValueError, FloatingPointError, FileNotFoundError, RuntimeError) as error:
        return error


def _on_processes(tasks: Iterable[tuple[Batch, str]], jobs: int) -> Iterator[tuple[Batch, Drawn | Exception]]:
    try:
        from joblib import Parallel, delayed
    except ModuleNotFoundError as error:
        raise ValueError("several jobs need joblib: pip install joblib, or use --jobs 1") from error
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with _importable():
        calls = (delayed(_draw_named)(batch, device, threads, os.getpid()) for batch, device in tasks)
        try:
            yield from Parallel(n_jobs=jobs, return_as="generator_unordered")(calls)
        except BrokenExecutor as error:
            raise ChildProcessError(
                "a worker process died, of too little memory perhaps (fewer --jobs or a smaller --batch need less)"
            ) from error


def _draw_named(batch: Batch, device: str, threads: int, caller: int) -> tuple[Batch, Drawn | Exception]:
    _end_with(caller)
    return batch, draw_one(batch, device, threads)


@cache
def _end_with(parent: int) -> None:
    """From now on, end this process once its parent has ended. (Windows does not tell a process of that.)"""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    if os.name == "posix":
        threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """Let worker processes find this package, which may have been loaded by its path alone."""
    sys.path.append(str(PACKAGE.parent))
    try:
        yield
    finally:
        sys.path.remove(str(PACKAGE.parent))


def _on_ray(tasks: Iterable[tuple[Batch, str]], workers: Workers) -> Iterator[tuple[Batch, Drawn | Exception]]:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError("--engine ray needs Ray: pip install ray") from error
    ours = not ray.is_initialized()
    if ours:
        options: dict[str, Any] = (
            {"address": workers.address} if workers.address else {"num_cpus": workers.jobs or os.cpu_count()}
        )
        try:
            ray.init(
                **options,
                runtime_env={"py_modules": [str(PACKAGE)]},
                include_dashboard=False if not workers.address else None,
                log_to_driver=False,
            )
        except Exception as error:  # Ray raises a plain Exception if its processes don't answer in time
            ray.shutdown()
            where = f"reached at {workers.address}" if workers.address else "started on this machine"
            raise ValueError(f"Ray could not be {where} ({error}): try again, or leave out --engine ray") from error
    try:
        resources = ray.cluster_resources()
        gpus = int(workers.device != "cpu" and resources.get("GPU", 0) >= 1)
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RAY_RETRIES)(draw_one)
        in_flight = workers.jobs or 2 * int(resources.get("GPU" if gpus else "CPU", 1))
        remaining = iter(tasks)
        waiting: dict[Any, Batch] = {}
        while True:
            for batch, _ in itertools.islice(remaining, in_flight - len(waiting)):
                # A worker sees only the GPU that Ray gave it, as its first.
                waiting[remote.remote(batch, "cuda:0" if gpus else "cpu", None if gpus else 1)] = batch
            if not waiting:
                return
            done, _ = ray.wait(list(waiting), num_returns=1)
            for reference in done:
                batch = waiting.pop(reference)
                try:
                    yield batch, ray.get(reference)
                except ray.exceptions.RayError as error:
                    yield batch, RuntimeError(f"Ray gave this batch up: {error}")
    finally:
        if ours:
            ray.shutdown()
