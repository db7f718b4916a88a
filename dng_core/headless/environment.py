"""Run the command line under the Python that has what it needs. Standard library only."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import HeadlessError
from .install import managed
from .locate import REINSTALL

LAUNCHER = Path(__file__).with_name("launch.py")


def missing_modules(names: Sequence[str]) -> list[str]:
    """Those of `names` that this interpreter cannot import."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def restart_under(python: Path, arguments: Sequence[str], missing: Sequence[str]) -> int:
    """Run the same command line under `python`, in this process's place where the system can.

    The launcher loads dng_core by its path. So no import path is changed, and a ComfyUI started later inherits none.
    Raises HeadlessError where this already is `python`, or where `python` cannot be started.
    """
    if Path(sys.executable).absolute() == python.absolute():
        named = (
            "Name the Python that runs your ComfyUI with --comfyui-python or DNG_COMFYUI_PYTHON, use --install, or "
            f"install what is missing: {python} -m pip install {' '.join(missing)}"
        )
        remedy = REINSTALL if python == managed().location.python else named
        raise HeadlessError(f"{python} lacks {' and '.join(missing)}.", remedy)
    command = [os.fspath(python), "-P", os.fspath(LAUNCHER), *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        if os.name == "nt":
            return subprocess.call(command)
        os.execv(python, command)
    except OSError as error:
        raise HeadlessError(f"{python} cannot be started: {error}", "Name another, or use --install.") from error
