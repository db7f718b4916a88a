"""Start ComfyUI as a child process that never outlives this one, and stop it with all that it started."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .errors import HeadlessError
from .locate import Location
from .paths import is_pack

CHILD = Path(__file__).with_name("child.py")
GRACE_SECONDS = 10.0


def start_comfyui(location: Location, options: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start `main.py OPTIONS`, its output going to `log`; raises HeadlessError where Python does not start."""
    command = [os.fspath(location.python), "-P", os.fspath(CHILD), os.fspath(location.path / "main.py"), *options]
    with log.open("wb") as output:
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # closes when this process ends, however it ends: see child.py
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=location.path,
                env=child_environment(),
                start_new_session=True,  # the terminal's Ctrl-C is for this process alone, which then stops the child
            )
        except OSError as error:
            raise HeadlessError(
                f"{location.python} cannot be started: {error}", "Name another Python with --comfyui-python."
            ) from error


def child_environment() -> dict[str, str]:
    """This process's environment without any copy of the pack on PYTHONPATH: nodes/ would hide ComfyUI's nodes.py."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    entries = environment.pop("PYTHONPATH", "").split(os.pathsep)
    if kept := [entry for entry in entries if entry and not is_pack(Path(entry))]:
        environment["PYTHONPATH"] = os.pathsep.join(kept)
    return environment


def stop(process: subprocess.Popen[bytes], grace_seconds: float = GRACE_SECONDS) -> None:
    """End the process and its whole group: politely first, by force after `grace_seconds`."""
    try:
        _signal_group(process, "SIGTERM")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_seconds)
    finally:
        _signal_group(process, "SIGKILL")
        if process.stdin:
            process.stdin.close()
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], name: str) -> None:
    if os.name != "posix":
        if process.poll() is None:
            process.terminate()
        return
    # An empty group is no error; macOS says EPERM for one that holds only zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, getattr(signal, name))
