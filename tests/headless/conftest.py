"""A ComfyUI that starts in a moment, and the command line as a user runs it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

from dng_core.headless.environment import LAUNCHER
from dng_core.headless.locate import Location

FAKE = Path(__file__).with_name("fake_comfyui")
Workflow = Callable[..., Path]


@pytest.fixture
def fake() -> Location:
    """A stand-in for ComfyUI; see fake_comfyui/main.py for what it can do."""
    return Location(FAKE, Path(sys.executable), "the tests")


@pytest.fixture
def workflow_file(tmp_path: Path) -> Workflow:
    """Write a workflow with one node of each class given and return its file."""

    def write(*classes: str) -> Path:
        nodes = {str(number): {"class_type": name, "inputs": {}} for number, name in enumerate(classes, 1)}
        path = tmp_path / "workflow.json"
        path.write_text(json.dumps(nodes))
        return path

    return write


@pytest.fixture
def dng() -> Callable[[Sequence[str], Mapping[str, str]], subprocess.Popen[str]]:
    """Start `dng ARGUMENTS` in a process of its own."""

    def start(arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", str(LAUNCHER), *arguments],
            env=dict(environment),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether `condition` comes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def runs(pid: int) -> bool:
    """Whether the process runs; one that ended and was not reaped yet does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def all_end(pids: Iterable[int]) -> bool:
    """Whether none of the processes runs, a moment from now at the latest: a killed one takes that to be gone."""
    awaited = list(pids)
    return wait_for(lambda: not any(runs(pid) for pid in awaited), 5.0)
