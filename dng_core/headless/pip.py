"""Run pip, show what it downloads, and say in plain words why it failed. Standard library only."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import HeadlessError
from .process import run_helper

SHOWN = ("Collecting", "Downloading", "Building", "Installing", "Saved")
LINE_WIDTH = 100  # like the number below, a choice
TAIL_LINES = 15
PYTHON = f"Python {sys.version_info.major}.{sys.version_info.minor} on {sys.platform}"

# What pip prints, the problem that it means, and the remedy. The first pattern that matches is taken.
REASONS = (
    (
        r"DO NOT MATCH THE HASHES|Hashes are required|HashMismatch",
        "a downloaded file is not the one this project was tested with: its SHA-256 differs.",
        "Nothing of it was used. Empty pip's cache (`pip cache purge`) and try again; if it differs still, the "
        "package index that pip is set up with serves something else: do not install it.",
    ),
    (
        r"No space left on device|\[Errno 28\]|not enough space",
        "the disk is full.",
        "Free about 10 GB, or set DNG_CACHE to a folder on another disk, and run the command again.",
    ),
    (
        r"NewConnectionError|Max retries exceeded|name resolution|ConnectionError|ReadTimeout|ProxyError|SSLError"
        r"|Network is unreachable|Connection refused",
        "the package index cannot be reached.",
        "Check the network (pip's proxy and index settings apply) and run the command again, or name a ComfyUI that "
        "you have with --comfyui.",
    ),
    (
        r"\(from versions: none\)",
        f"the package index cannot be reached, or has nothing for {PYTHON}.",
        "Check the network (pip's proxy and index settings apply) and run the command again with Python 3.11, 3.12 or "
        "3.13, or name a ComfyUI that you have with --comfyui.",
    ),
    (
        r"No matching distribution found|Could not find a version",
        f"the package index has no fitting release for {PYTHON}.",
        "Use Python 3.11, 3.12 or 3.13, or name a ComfyUI that you have with --comfyui.",
    ),
)


def run_pip(
    python: Path, arguments: Sequence[str | Path], purpose: str, variables: Mapping[str, str] | None = None
) -> None:
    """Run `pip ARGUMENTS` under `python`, with further environment `variables`.

    Raises HeadlessError with the reason where pip fails.
    """
    options = ("--disable-pip-version-check", "--no-input")
    status, lines = run_helper(python, ["-m", "pip", *arguments, *options], show, variables)
    if status:
        problem, remedy = explain("\n".join(lines))
        tail = "\n".join(f"  | {line}" for line in lines[-TAIL_LINES:])
        raise HeadlessError(f"{purpose} failed: {problem}\n{tail}", remedy)


def show(line: str) -> None:
    """Print a line of pip's output if it reports progress."""
    if line.strip().startswith(SHOWN):
        print(f"  {line.strip()[:LINE_WIDTH]}", file=sys.stderr, flush=True)


def explain(output: str) -> tuple[str, str]:
    """The problem and the remedy that pip's output tells of."""
    for pattern, problem, remedy in REASONS:
        if re.search(pattern, output):
            return problem, remedy
    return "pip stopped with an error.", "Its last lines are above."
