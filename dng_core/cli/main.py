"""The command line `dng`: each command is the module of its name beside this one, imported when it is used.

A command's module has `add_arguments(parser)` and `run(args) -> int`. It is imported only if the interpreter has the
modules that the command needs. If PyTorch is missing, the same command is started again under the Python of the
ComfyUI that this project installs.
"""

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from .. import __version__
from ..headless.environment import missing_modules, restart_under
from ..headless.errors import HeadlessError
from ..headless.install import ensure_installed, managed

TORCH = ("torch", "tqdm", "PIL")
PACKAGES = {"PIL": "pillow"}  # of modules that have another name than the package that brings them


@dataclass(frozen=True)
class Command:
    """A command: its name, a line of help, the modules that it cannot do without, and what happens to other arguments.

    ``passes_on``: arguments that the command does not know go to another program, as ``args.passed_on``.
    """

    name: str
    help: str
    needs: tuple[str, ...] = ()
    passes_on: bool = False


COMMANDS = (
    Command("run", "run an API-format workflow in a real ComfyUI"),
    Command("install", "install the pinned ComfyUI into the user's cache"),
    Command("test", "run all tests of this checkout", passes_on=True),
    Command("train", "train the shipped models, or your own", TORCH),
    Command("calibrate", "measure how far a denoiser's evidence counts", TORCH),
    Command("experiment", "remove classes by every method, and measure what is left", TORCH),
    Command("report", "report on an experiment's runs", TORCH),
    Command("bench", "measure how fast images are drawn", TORCH),
    Command("gpu", "put a GPU that is at hand for minutes to use", TORCH),
    Command("figures", "print the project's figures", TORCH),
)


def python_with(missing: Sequence[str], command: str) -> Path:
    """The Python of the managed ComfyUI, which is installed for PyTorch's sake alone.

    Raises HeadlessError where it is not there and the missing packages are small.
    """
    if "torch" in missing or managed().is_whole():
        return ensure_installed().python
    names = " ".join(missing)
    raise HeadlessError(f"dng {command} needs {names}.", f"Install it: {sys.executable} -m pip install {names}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (1: an error with a message, 130: Ctrl-C, 143: terminated)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="dng", description="Dynamic Negative Guidance for ComfyUI, headless.")
    parser.add_argument("--version", action="version", version=f"dng {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    subparsers_by_name = {command.name: subparsers.add_parser(command.name, help=command.help) for command in COMMANDS}
    chosen = next((command for command in COMMANDS if arguments[:1] == [command.name]), None)
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.raise_signal(signal.SIGINT)  # the code that handles Ctrl-C then also handles these signals

    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), interrupt)
    try:
        if chosen is None:
            parser.parse_args(arguments)
            return 2
        if missing := missing_modules(chosen.needs):
            packages = [PACKAGES.get(name, name) for name in missing]
            return restart_under(python_with(packages, chosen.name), arguments, packages)
        module = importlib.import_module(f".{chosen.name}", __package__)
        module.add_arguments(subparsers_by_name[chosen.name])
        args, unknown = parser.parse_known_args(arguments)
        if chosen.passes_on:
            args.passed_on = unknown
        elif unknown:
            subparsers_by_name[chosen.name].error(f"unrecognized arguments: {' '.join(unknown)}")
        status: int = module.run(args)
        return status
    except HeadlessError as error:
        print(f"dng: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dng: stopped", file=sys.stderr)
        return 128 + (received[0] if received else signal.SIGINT)
