"""Start programs as child processes that never outlive this one, and stop them with all that they started."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from .errors import HeadlessError
from .paths import is_pack

CHILD = Path(__file__).with_name("child.py")
GRACE_SECONDS = 10.0  # a choice


def start(
    python: Path,
    arguments: Sequence[str | Path],
    output: IO[bytes] | int,
    folder: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start `python ARGUMENTS` in `folder`, as the leader of a process group; everything printed goes to `output`.

    `variables` are added to the environment. Raises HeadlessError where that Python does not start.
    """
    try:
        return subprocess.Popen(
            [python, "-P", CHILD, *arguments],
            stdin=subprocess.PIPE,  # closes when this process ends, however it ends: see child.py
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**child_environment(), **(variables or {})},
            start_new_session=True,  # Ctrl-C in the terminal reaches this process only, which then stops the child
        )
    except OSError as error:
        raise HeadlessError(
            f"{python} cannot be started: {error}", "Name another Python with --comfyui-python."
        ) from error


def run_helper(
    python: Path,
    arguments: Sequence[str | Path],
    on_line: Callable[[str], None] = lambda line: None,
    variables: Mapping[str, str] | None = None,
) -> tuple[int, list[str]]:
    """Run `python ARGUMENTS` to its end; passes each line to `on_line`; returns the status and all lines."""
    process = start(python, arguments, subprocess.PIPE, variables=variables)
    lines: list[str] = []
    try:
        for line in process.stdout or ():
            lines.append(line.decode(errors="replace").rstrip())
            on_line(lines[-1])
        return process.wait(), lines
    finally:
        stop(process)


def child_environment() -> dict[str, str]:
    """This process's environment without any copy of the pack on PYTHONPATH: nodes/ would hide ComfyUI's nodes.py."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    entries = environment.pop("PYTHONPATH", "").split(os.pathsep)
    if kept := [entry for entry in entries if entry and not is_pack(Path(entry))]:
        environment["PYTHONPATH"] = os.pathsep.join(kept)
    return environment


def stop(process: subprocess.Popen[bytes], grace_seconds: float = GRACE_SECONDS) -> None:
    """Ask the process and its whole group to end, and kill what is left after `grace_seconds`."""
    try:
        _signal_group(process, "SIGTERM")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_seconds)
    finally:
        _signal_group(process, "SIGKILL")
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], name: str) -> None:
    if os.name != "posix":
        if process.poll() is None:
            process.terminate()
        return
    # An empty group is no error. For a group of zombies only, macOS reports EPERM.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, getattr(signal, name))
