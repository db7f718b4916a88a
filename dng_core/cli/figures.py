"""``dng figures``: prints the project's figures as tables, and records them with what made them.

Modules that need aiohttp are imported where they are used, so that the other figures do not need it.
"""

import argparse
import importlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from tqdm import tqdm

from .. import __version__
from ..files import write_whole
from ..headless.errors import HeadlessError
from ..headless.figures.kept import Row
from ..headless.install import ensure_installed
from ..headless.locate import Location, find_comfyui
from ..headless.paths import BENCH_NODES, checkout
from ..models.datasets import DATASETS
from ..models.devices import machine
from ..models.predictors import Precision
from ..studies import oracle_figures
from ..studies.report.markdown import line, table_lines
from ..studies.samplers import SAMPLERS

if TYPE_CHECKING:
    from ..headless.figures.oracle_runs import OracleRunner
    from ..headless.server import Server

ALL = ("all",)
TYPICAL_SAMPLERS = ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_2m")  # ancestral, SDE and deterministic
NETWORK_STEPS, BOOK_STEPS = 50, {"picture-book": 30, "shares": 20}  # of the figures on networks: a choice
WORKFLOW = Path("workflows", "api", "mnist_class_removal.json")


@dataclass(frozen=True)
class Figure:
    """A figure: its line of help, a function that yields its rows, and its default number of samples or images.

    ``over_samplers``: whether it runs over ComfyUI's samplers, which the options of the oracle figures choose.
    """

    help: str
    rows: Callable[[argparse.Namespace], Iterator[Row]]
    samples: int = 2000
    over_samplers: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``dng figures``."""
    parser.description = "Print figures: " + "; ".join(f"{name} ({of.help})" for name, of in FIGURES.items()) + "."
    parser.add_argument("figure", choices=tuple(FIGURES), help="which figure")
    usual = Figure.samples
    others = ", ".join(f"{name} {figure.samples}" for name, figure in FIGURES.items() if figure.samples != usual)
    parser.add_argument("--samples", type=int, help=f"samples or images per point (default: {usual}; {others})")
    parser.add_argument("--repeats", type=int, default=10, help="turns of start and live-chart (default: 10)")
    networks = parser.add_argument_group("the figures networks and calibration")
    networks.add_argument(
        "--denoisers", nargs="+", default=["mnist"], metavar="SOURCE", help="shipped ones or files (default: mnist)"
    )
    networks.add_argument("--data", type=Path, help="folder of the data, for the distance and the error of denoising")
    networks.add_argument("--dataset", choices=DATASETS, default="mnist", help="what --data holds (default: mnist)")
    networks.add_argument(
        "--classifier", default="mnist", metavar="SOURCE", help="shipped one or file (default: mnist)"
    )
    parser.add_argument(
        "--weights", type=Path, help="of picture-book, carry-over and shares (default: the shipped ones)"
    )
    parser.add_argument("--cfg", type=float, default=3.0, help="of shares (default: 3)")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="float32",
        help="in which the networks of calibration and carry-over compute while they are judged (default: float32)",
    )
    oracle = parser.add_argument_group(
        "the figures " + ", ".join(name for name, figure in FIGURES.items() if figure.over_samplers)
    )
    oracle.add_argument("--samplers", nargs="+", metavar="NAME", help="ComfyUI's names (most figures: all)")
    oracle.add_argument("--schedulers", nargs="+", metavar="NAME", help="ComfyUI's names (matrix: all, else karras)")
    oracle.add_argument(
        "--steps",
        type=int,
        nargs="+",
        metavar="N",
        help=f"step counts (most figures: 30; calibration measures with the first and judges with each; others on "
        f"networks take one; default there: {NETWORK_STEPS}, "
        + ", ".join(f"{name} {steps}" for name, steps in BOOK_STEPS.items())
        + ")",
    )
    oracle.add_argument("--nodes", nargs="+", metavar="NAME", help="nodes of matrix and off: ksampler, guider, patch")
    oracle.add_argument("--batches", type=int, nargs="+", metavar="N", help="batch sizes of economy (default: 1 16)")
    oracle.add_argument("--settings", choices=("oracle", "cifar10"), default="oracle", help="default: oracle")
    oracle.add_argument("--prediction", choices=("epsilon", "v", "flow"), default="epsilon", help="oracle's output")
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
    figure = FIGURES[args.figure]
    if args.samples is None:
        args.samples = figure.samples
    lists = [(option, min(getattr(args, option) or [1])) for option in ("steps", "batches")]
    for option, least in (("samples", args.samples), ("repeats", args.repeats), *lists):
        if least < 1:
            raise HeadlessError(f"--{option} must be at least 1, not {least}.")
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    table: list[Row] = []
    try:
        for row in figure.rows(args):
            if not table:
                tqdm.write("\n".join(table_lines(list(row), [])))
            tqdm.write(line(map(show, row.values())))
            sys.stdout.flush()
            table.append(row)
    except (OSError, ValueError, FloatingPointError) as error:
        raise HeadlessError(f"dng figures {args.figure}: {error}") from error
    record = {
        "figure": figure.help,
        "command": "dng " + " ".join(sys.argv[1:]),
        "seed": args.seed,
        "samples": args.samples,
        "seconds": round(time.monotonic() - started, 1),
        "versions": {"dng": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": machine(),
        "rows": table,
    }
    write_whole(args.output / f"{args.figure}.json", (json.dumps(record, indent=2) + "\n").encode())
    lines = table_lines(list(table[0]), [list(map(show, row.values())) for row in table])
    if args.figure == "matrix":
        lines = write_matrix(args, table)
    write_whole(args.output / f"{args.figure}.md", ("\n".join(lines) + "\n").encode())
    print(f"\nRecorded in {args.output / args.figure}.json ({record['seconds']} s)")
    return 0


def write_matrix(args: argparse.Namespace, table: list[Row]) -> list[str]:
    """Draw the matrix, print it as a table of samplers and schedulers, and return the lines of that table."""
    from ..headless.figures.matrix_picture import heat_map
    from ..headless.figures.sampler_matrix import matrix_table, nodes_agree

    node = args.nodes[0] if args.nodes else "ksampler"
    lines = [matrix_table(table, node)]
    print("", *lines, f"The nodes differ by at most {100 * nodes_agree(table):.2g} points.", sep="\n")
    measured = f"Oracle, {args.prediction}, {args.settings} settings, {node}, {args.samples} samples"
    heat_map(table, node, " ".join([measured, *args.set])).save(args.output / "matrix.png")
    return lines


def show(value: Any) -> str:
    """A cell: floats with four significant digits."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def of_the_network(help: str, name: str) -> Figure:
    """A figure on the shipped MNIST network: a function of studies/evidence_figures."""

    def rows(args: argparse.Namespace) -> Iterator[Row]:
        from ..studies import evidence_figures

        yield from getattr(evidence_figures, name)(args.samples, one_step_count(args), args.seed)

    return Figure(help, rows, 512)


def networks(args: argparse.Namespace) -> Iterator[Row]:
    from ..studies.network_figures import networks_figure

    yield from networks_figure(
        args.denoisers,
        args.data,
        args.samples,
        one_step_count(args),
        args.seed,
        args.classifier,
        args.dataset,
        args.output,
    )


def calibration(args: argparse.Namespace) -> Iterator[Row]:
    from ..studies.calibrating import calibration_figure

    steps, samplers = args.steps or [NETWORK_STEPS], args.samplers or ["euler_ancestral"]
    if unknown := [name for name in samplers if name not in SAMPLERS]:
        raise HeadlessError(f"--samplers: the figure calibration has {', '.join(SAMPLERS)}, not {unknown[0]}.")
    told = (args.classifier, samplers, args.precision)
    for denoiser in args.denoisers:
        yield from calibration_figure(args.samples, steps, args.seed, denoiser, *told)


def carry_over(args: argparse.Namespace) -> Iterator[Row]:
    from ..studies.picture_book.posteriors import carry_over_figure

    yield from carry_over_figure(args.weights, args.samples, args.seed, args.precision)


def shares(args: argparse.Namespace) -> Iterator[Row]:
    from ..studies.picture_book.posteriors import shares_figure

    yield from shares_figure(args.weights, args.samples, one_step_count(args), args.seed, args.cfg)


def picture_book(args: argparse.Namespace) -> Iterator[Row]:
    from ..studies.picture_book.figure import picture_book_figure

    sheet = args.output / f"{args.figure}.png"
    yield from picture_book_figure(args.weights, sheet, args.samples, one_step_count(args), args.seed)


def one_step_count(args: argparse.Namespace) -> int:
    """The step count of a figure on networks; raises HeadlessError for several."""
    steps: list[int] = args.steps or [BOOK_STEPS.get(args.figure, NETWORK_STEPS)]
    if len(steps) > 1:
        raise HeadlessError(f"--steps: the figure {args.figure} takes one step count, not {len(steps)}.")
    return steps[0]


def over_samplers(
    help: str,
    name: str,
    samplers: Sequence[str] = ALL,
    schedulers: Sequence[str] = ("karras",),
    steps: Sequence[int] = (30,),
) -> Figure:
    """A figure on the oracle: MODULE.FUNCTION (``name``) of headless/figures. The last three are option defaults."""

    def rows(args: argparse.Namespace) -> Iterator[Row]:
        from ..headless.figures.oracle_choice import chosen_by

        module, function = name.split(".")
        figure = getattr(importlib.import_module(f"..headless.figures.{module}", __package__), function)
        with oracle_runner(args) as runner:
            yield from figure(runner, chosen_by(args, runner.options(), samplers, schedulers, steps))

    return Figure(help, rows, over_samplers=True)


def economy(args: argparse.Namespace) -> Iterator[Row]:
    from ..headless.figures.economy_figure import BATCHES, economy_figure
    from ..headless.figures.oracle_choice import chosen_by

    with oracle_runner(args, [BENCH_NODES]) as runner:
        choice = chosen_by(args, runner.options(), TYPICAL_SAMPLERS, ("karras",), (30,))
        yield from economy_figure(runner, choice, args.batches or BATCHES)


def economy_mnist(args: argparse.Namespace) -> Iterator[Row]:
    from ..headless.figures.economy_figure import BATCHES, economy_mnist_figure

    with oracle_runner(args, [BENCH_NODES]) as runner:
        for denoiser in args.denoisers:
            steps, batches = one_step_count(args), args.batches or BATCHES
            yield from economy_mnist_figure(runner, denoiser, args.samples, steps, args.seed, batches)


def comfyui(args: argparse.Namespace) -> Iterator[Row]:
    from ..headless.figures.comfyui_figures import oracle_figure

    with oracle_runner(args) as runner:
        yield from oracle_figure(runner, args.samples, args.seed)


def mnist(args: argparse.Namespace) -> Iterator[Row]:
    from ..headless.figures.comfyui_figures import mnist_figure

    with server_with_pack(args) as (server, pack):
        yield from mnist_figure(server, pack / WORKFLOW, args.samples, kept_in(args))


def help_pictures(args: argparse.Namespace) -> Iterator[Row]:
    from ..headless.figures.help_pictures import help_figure

    with server_with_pack(args) as (server, pack):
        yield from help_figure(server, pack / WORKFLOW.parent, args.output / args.figure)


def live_chart(args: argparse.Namespace) -> Iterator[Row]:
    from ..headless.figures.cost_figures import live_chart_figure

    with server_with_pack(args) as (server, _):
        yield from live_chart_figure(server, args.samples, args.repeats)


def start(args: argparse.Namespace) -> Iterator[Row]:
    from ..headless.figures.cost_figures import start_figure

    yield from start_figure(*comfyui_and_pack(args), args.repeats)


@contextmanager
def oracle_runner(args: argparse.Namespace, further: Sequence[str] = ()) -> Iterator["OracleRunner"]:
    """A ComfyUI that samples the oracle."""
    from ..headless.figures.oracle_runs import OracleRunner

    with server_with_pack(args, further) as (server, pack):
        yield OracleRunner(server, pack, kept_in(args))


@contextmanager
def server_with_pack(args: argparse.Namespace, further: Sequence[str] = ()) -> Iterator[tuple["Server", Path]]:
    """A ComfyUI with the node pack and the nodes in the folders ``further`` of it, and the pack's folder."""
    from ..headless.server import comfyui_server

    location, pack = comfyui_and_pack(args)
    folders = [pack / folder for folder in further]
    if not all(folder.is_dir() for folder in folders):
        raise HeadlessError("This figure needs nodes of its own: run it in a clone of the project's repository.")
    with comfyui_server(location, pack, log=args.output / "comfyui.log", further=folders) as server:
        yield server, pack


def comfyui_and_pack(args: argparse.Namespace) -> tuple[Location, Path]:
    """The ComfyUI to start and the checkout with the node pack; raises HeadlessError outside a checkout."""
    pack = checkout()
    if pack is None:
        raise HeadlessError("This figure needs the node pack: run it in a checkout of the project.")
    return find_comfyui(args.comfyui) or ensure_installed(), pack


def kept_in(args: argparse.Namespace) -> Path:
    """The file that keeps what a figure measured already."""
    output: Path = args.output
    return output / f"{args.figure}.cache.json"


FIGURES = {
    "increment": Figure(
        "1: the increment against the paper's formula in float64",
        lambda args: oracle_figures.increment_figure(args.seed),
    ),
    "posterior": Figure(
        "2: the tracked posterior against the exact one, over step counts",
        lambda args: oracle_figures.posterior_figure(args.samples, args.seed),
    ),
    "removal": Figure(
        "3: the oracle under the paper's CIFAR-10 settings, over step counts and schedules",
        lambda args: oracle_figures.removal_figure(args.samples, args.seed),
    ),
    "comfyui": Figure("4: the oracle in a real ComfyUI, KSampler (DNG) and patch", comfyui),
    "mnist": Figure("5: MNIST in a real ComfyUI, all ten digits, against negative prompting", mnist, 512),
    "evidence": of_the_network(
        "whether the two predictions of the MNIST network agree: evidence for their class in its own images",
        "evidence_figure",
    ),
    "rules": of_the_network(
        "how well the posterior's rules foretell the classes of the MNIST network's images", "rules_figure"
    ),
    "calibration": Figure(
        "what calibration makes of the posterior of MNIST networks, on held-out images", calibration, 192
    ),
    "networks": Figure(
        "denoisers by themselves: how clear, even and near to real images their unguided images are", networks
    ),
    "picture-book": Figure(
        "what the picture book draws without guidance, against what was asked and what scenes show", picture_book, 256
    ),
    "carry-over": Figure(
        "how well the picture book's calibration serves at other cfg, samplers and step counts than its own",
        carry_over,
        64,
    ),
    "shares": Figure(
        "what Calibrate says of things that the picture book draws often, at times and never, and the judge",
        shares,
        32,
    ),
    "matrix": over_samplers(
        "every sampler and scheduler of a real ComfyUI against the oracle's exact answer, through every node",
        "sampler_matrix.matrix_figure",
        schedulers=ALL,
    ),
    "predictions": over_samplers("flow and v oracles against the epsilon one", "exact_figures.predictions_figure"),
    "concepts": over_samplers(
        "two forbidden components of eight, as a list and as chained patches",
        "exact_figures.concepts_figure",
        TYPICAL_SAMPLERS,
    ),
    "step-counts": over_samplers(
        "the same settings at several step counts, per sampler",
        "exact_figures.step_counts_figure",
        steps=(15, 30, 60, 250),
    ),
    "references": over_samplers(
        "what is left under CFG, by what the undesired prediction is compared with",
        "exact_figures.references_figure",
        ("euler_ancestral",),
    ),
    "off": over_samplers(
        "whether guidance scale 0 is the stock sampler, bit for bit, per sampler",
        "exact_figures.off_figure",
        steps=(8,),
    ),
    "unrelated": over_samplers(
        "a related and an unrelated concept, against a constant negative prompt",
        "exact_figures.unrelated_figure",
        ("euler_ancestral",),
    ),
    "economy": Figure(
        "what economy leaves out, and what that changes, alone and in batches", economy, over_samplers=True
    ),
    "economy-mnist": Figure(
        "the same on MNIST networks (--denoisers) by their calibrations, away from one digit", economy_mnist, 128
    ),
    "help": Figure("the pictures on the nodes' help pages, in the folder help", help_pictures),
    "start": Figure("what the pack adds to ComfyUI's start", start),
    "live-chart": Figure("what the live chart adds to a 30-step MNIST run", live_chart, 16),
}
