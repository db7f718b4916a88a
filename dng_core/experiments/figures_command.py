"""``dng figures``: prints the project's figures as tables, and records them with what made them."""

import argparse
import contextlib
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..headless.errors import HeadlessError
from ..headless.install import ensure_installed
from ..headless.locate import find_comfyui
from ..headless.paths import checkout
from . import oracle_figures

FIGURES = {
    "increment": "1: the increment against the paper's formula in float64",
    "posterior": "2: the tracked posterior against the exact one, over step counts",
    "removal": "3: the oracle under the paper's CIFAR-10 settings, over step counts and schedules",
    "comfyui": "4: the oracle in a real ComfyUI, KSampler (DNG) and patch",
    "mnist": "5: MNIST in a real ComfyUI, all ten digits, against negative prompting",
    "samplers": "every sampler of a real ComfyUI on the oracle, KSampler (DNG) and patch",
}
WORKFLOW = Path("workflows", "api", "mnist_class_removal.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``dng figures``."""
    parser.description = "Print figures: " + "; ".join(f"{name} ({text})" for name, text in FIGURES.items()) + "."
    parser.add_argument("figure", choices=tuple(FIGURES), help="which figure")
    parser.add_argument("--samples", type=int, help="samples or images per point (default: 2000; mnist 512)")
    parser.add_argument("--steps", type=int, default=30, help="steps of the samplers figure (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("output", "figures"), help="folder for the records")
    parser.add_argument(
        "--comfyui", type=Path, metavar="FOLDER", help="the ComfyUI to use (default: as for `dng run`)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table and write it, with versions and the time taken, to FIGURE.json and FIGURE.md."""
    samples = args.samples or (512 if args.figure == "mnist" else 2000)
    if samples < 1:
        raise HeadlessError(f"--samples must be at least 1, not {samples}.")
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    table: list[dict[str, Any]] = []
    for row in rows_of(args, samples):
        if not table:
            print(line(list(row)), line(["---"] * len(row)), sep="\n")
        print(line(list(row.values())), flush=True)
        table.append(row)
    record = {
        "figure": FIGURES[args.figure],
        "command": "dng " + " ".join(sys.argv[1:]),
        "seed": args.seed,
        "samples": samples,
        "seconds": round(time.monotonic() - started, 1),
        "versions": {"dng": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"),
        "rows": table,
    }
    (args.output / f"{args.figure}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    lines = [line(list(table[0])), line(["---"] * len(table[0])), *(line(list(row.values())) for row in table)]
    (args.output / f"{args.figure}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\nRecorded in {args.output / args.figure}.json ({record['seconds']} s)")
    return 0


def rows_of(args: argparse.Namespace, samples: int) -> Iterator[dict[str, Any]]:
    """The rows of the chosen figure, as they come."""
    if args.figure == "increment":
        yield from oracle_figures.increment_figure(args.seed)
    elif args.figure == "posterior":
        yield from oracle_figures.posterior_figure(samples, args.seed)
    elif args.figure == "removal":
        yield from oracle_figures.removal_figure(samples, args.seed)
    else:
        # These need aiohttp, which the mathematics' figures do without.
        from ..headless.server import comfyui_server
        from . import comfyui_figures

        location = find_comfyui(args.comfyui) or ensure_installed()
        pack = checkout()
        if pack is None:
            raise HeadlessError("This figure needs the node pack: run it in a checkout of the project.")
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(comfyui_server(location, pack, log=args.output / "comfyui.log"))
            if args.figure == "comfyui":
                yield from comfyui_figures.oracle_figure(server, samples, args.seed)
            elif args.figure == "samplers":
                yield from comfyui_figures.samplers_figure(server, samples, args.seed, args.steps)
            else:
                cache = args.output / "mnist.cache.json"
                yield from comfyui_figures.mnist_figure(server, pack / WORKFLOW, samples, cache)


def line(cells: list[Any]) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(show(cell) for cell in cells) + " |"


def show(value: Any) -> str:
    """A cell: floats with four significant digits."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
