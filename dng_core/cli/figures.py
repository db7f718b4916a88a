"""``dng figures``: prints the project's figures as tables, and records them with what made them."""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import __version__
from ..files import write_whole
from ..headless.errors import HeadlessError
from ..headless.install import ensure_installed
from ..headless.locate import find_comfyui
from ..headless.paths import checkout
from ..studies import oracle_figures

FIGURES = {
    "increment": "1: the increment against the paper's formula in float64",
    "posterior": "2: the tracked posterior against the exact one, over step counts",
    "removal": "3: the oracle under the paper's CIFAR-10 settings, over step counts and schedules",
    "comfyui": "4: the oracle in a real ComfyUI, KSampler (DNG) and patch",
    "mnist": "5: MNIST in a real ComfyUI, all ten digits, against negative prompting",
    "evidence": "whether the two predictions of the MNIST network agree: evidence for their class in its own images",
    "rules": "how well the posterior's rules foretell the classes of the MNIST network's images",
    "matrix": "every sampler and scheduler of a real ComfyUI against the oracle's exact answer, through every node",
    "predictions": "flow and v oracles against the epsilon one",
    "concepts": "two forbidden components of eight, as a list and as chained patches",
    "step-counts": "the same settings at several step counts, per sampler",
    "references": "what is left under CFG, by what the undesired prediction is compared with",
    "off": "whether guidance scale 0 is the stock sampler, bit for bit, per sampler",
    "unrelated": "a related and an unrelated concept, against a constant negative prompt",
    "start": "what the pack adds to ComfyUI's start",
    "live-chart": "what the live chart adds to a 30-step MNIST run",
}
ORACLE_FIGURES = ("matrix", "predictions", "concepts", "step-counts", "references", "off", "unrelated")
DEFAULT_SAMPLES = {"mnist": 512, "evidence": 512, "rules": 512, "live-chart": 16}
WORKFLOW = Path("workflows", "api", "mnist_class_removal.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``dng figures``."""
    parser.description = "Print figures: " + "; ".join(f"{name} ({text})" for name, text in FIGURES.items()) + "."
    parser.add_argument("figure", choices=tuple(FIGURES), help="which figure")
    parser.add_argument(
        "--samples",
        type=int,
        help="samples or images per point (default: 2000; mnist, evidence, rules 512; live-chart 16)",
    )
    parser.add_argument("--repeats", type=int, default=10, help="of start and live-chart: turns (default: 10)")
    oracle = parser.add_argument_group("the figures " + ", ".join(ORACLE_FIGURES))
    oracle.add_argument("--samplers", nargs="+", metavar="NAME", help="ComfyUI's names (most figures: all)")
    oracle.add_argument("--schedulers", nargs="+", metavar="NAME", help="ComfyUI's names (matrix: all, else karras)")
    oracle.add_argument(
        "--steps", type=int, nargs="+", metavar="N", help="step counts (most figures 30, evidence, rules 50)"
    )
    oracle.add_argument("--nodes", nargs="+", metavar="NAME", help="of the matrix and of off: ksampler, guider, patch")
    oracle.add_argument("--settings", choices=("oracle", "cifar10"), default="oracle", help="guidance (default: oracle)")
    oracle.add_argument("--prediction", choices=("epsilon", "v", "flow"), default="epsilon", help="of the oracle")
    oracle.add_argument(
        "--set", action="append", default=[], metavar="INPUT=VALUE", help="an input of the guiding nodes (repeatable)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("output", "figures"), help="folder for the records")
    parser.add_argument(
        "--comfyui", type=Path, metavar="FOLDER", help="the ComfyUI to use (default: as for `dng run`)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table and write it, with versions and the time taken, to FIGURE.json and FIGURE.md."""
    samples = args.samples or DEFAULT_SAMPLES.get(args.figure, 2000)
    if samples < 1:
        raise HeadlessError(f"--samples must be at least 1, not {samples}.")
    if args.repeats < 1:
        raise HeadlessError(f"--repeats must be at least 1, not {args.repeats}.")
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    table: list[dict[str, Any]] = []
    for row in rows_of(args, samples):
        if not table:
            tqdm.write("\n".join([line(list(row)), line(["---"] * len(row))]))
        tqdm.write(line(list(row.values())))
        sys.stdout.flush()
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
    write_whole(args.output / f"{args.figure}.json", (json.dumps(record, indent=2) + "\n").encode())
    lines = [line(list(table[0])), line(["---"] * len(table[0])), *(line(list(row.values())) for row in table)]
    if args.figure == "matrix":
        from ..headless.figures.matrix_picture import heat_map
        from ..headless.figures.sampler_matrix import matrix_table, nodes_agree

        node = args.nodes[0] if args.nodes else "ksampler"
        lines = [matrix_table(table, node)]
        print("", *lines, f"The nodes differ by at most {100 * nodes_agree(table):.2g} points.", sep="\n")
        title = " ".join(
            [f"Oracle, {args.prediction}, {args.settings} settings, {node}, {samples} samples", *args.set]
        )
        heat_map(table, node, title).save(args.output / "matrix.png")
    write_whole(args.output / f"{args.figure}.md", ("\n".join(lines) + "\n").encode())
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
    elif args.figure in ("evidence", "rules"):
        from ..studies.evidence_figures import evidence_figure, rules_figure

        figure = evidence_figure if args.figure == "evidence" else rules_figure
        yield from figure(samples, args.steps[0] if args.steps else 50, args.seed)
    else:
        # These need aiohttp, which the mathematics' figures do without.
        from ..headless.figures import comfyui_figures, cost_figures
        from ..headless.figures.oracle_choice import oracle_rows
        from ..headless.figures.oracle_runs import OracleRunner
        from ..headless.server import comfyui_server

        location = find_comfyui(args.comfyui) or ensure_installed()
        pack = checkout()
        if pack is None:
            raise HeadlessError("This figure needs the node pack: run it in a checkout of the project.")
        if args.figure == "start":
            yield from cost_figures.start_figure(location, pack, args.repeats)
            return
        with comfyui_server(location, pack, log=args.output / "comfyui.log") as server:
            if args.figure == "live-chart":
                yield from cost_figures.live_chart_figure(server, samples, args.repeats)
                return
            cache = args.output / f"{args.figure}.cache.json"
            if args.figure == "mnist":
                yield from comfyui_figures.mnist_figure(server, pack / WORKFLOW, samples, cache)
                return
            runs = OracleRunner(server, pack, cache)
            if args.figure == "comfyui":
                yield from comfyui_figures.oracle_figure(runs, samples, args.seed)
            else:
                yield from oracle_rows(args, samples, runs)


def line(cells: list[Any]) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(show(cell) for cell in cells) + " |"


def show(value: Any) -> str:
    """A cell: floats with four significant digits."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
