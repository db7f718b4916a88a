"""``dng gpu``: what a GPU that is at hand for minutes is good for, in one folder.

It checks that guidance never waits for the device, measures how fast the experiment draws, and trains a network for
the rest of the time.
"""

import argparse
import contextlib
import io
import math
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..files import read_json, write_json, write_whole
from ..guidance import NegativeGuidance
from ..headless.paths import PACKAGE_FOLDER
from ..models.checkpoints import open_denoiser
from ..models.devices import devices, machine
from ..models.networks import UNet
from ..models.predictors import LabelConditional
from ..models.training_plan import TrainingPlan, read_plan
from ..models.weight_files import load_denoiser
from ..posterior import Chain
from ..schedules import DDPMSchedule, ddpm_sigmas
from ..settings import Settings
from ..studies.class_removal import chain_name, image_shape
from ..studies.network_figures import SHOWN, labelled_images, sheet, unguided
from . import bench, train

TRAINED = 0.9  # share of the time that is left which training may take; the rest is for loading and writing
SAMPLING_STEPS = 50  # of the sheet; a choice, like the two numbers below
GUIDED_STEPS, GUIDED_BATCH = 20, 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``dng gpu``."""
    parser.description = (
        "Check that guidance never waits for the GPU, measure how fast the experiment draws, and train a denoiser for "
        "the rest of the minutes given. Everything lies in one folder: gpu.md, gpu.json, weights with their record, "
        "and a sheet of their images. Without a GPU, the same is done on the CPU, less the check."
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the plan's data set")
    parser.add_argument("--output", type=Path, default=Path("output", "gpu"), help="folder (default: output/gpu)")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for everything (default: 10)")
    parser.add_argument("--plan", default="cifar10_denoiser", help="a plan of a denoiser (default: cifar10_denoiser)")
    parser.add_argument("--start-from", type=Path, metavar="WEIGHTS", help="weights to go on from (default: random)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--repeats", type=int, default=3, help="turns of the measurement (default: 3)")
    parser.add_argument("--batch", type=int, default=64, help="images at once in the measurement (default: 64)")
    parser.add_argument("--timed-steps", type=int, default=10, help="steps of a turn, a multiple of 10 (default: 10)")


def run(args: argparse.Namespace) -> int:
    """Do all of it; returns 1, with a message, if something fails. What was found before is in the folder."""
    began = time.monotonic()
    versions = {"dng": __version__, "torch": torch.__version__, "machine": machine()}
    found: dict[str, Any] = {"command": "dng " + " ".join(sys.argv[1:]), "versions": versions}
    try:
        if not 0 < args.minutes < math.inf:
            raise ValueError(f"--minutes must be above 0, not {args.minutes:g}")
        plan = read_plan(args.plan)
        if plan.model != "denoiser" or plan.labels == "none":
            raise ValueError(f"--plan {args.plan} trains no label-conditional denoiser, which this command is for")
        device = devices(args.device)[0]
        args.output.mkdir(parents=True, exist_ok=True)
        for part in (checked(device), measured(args, device), trained(args, plan, device, began)):
            for name, value in part:
                found[name] = value
                print(f"{name}: {value}", flush=True)
                found["seconds"] = round(time.monotonic() - began, 1)
                write_json(args.output / "gpu.json", found)
                write_whole(args.output / "gpu.md", markdown(found).encode())
    except (OSError, ValueError, FloatingPointError, RuntimeError) as error:
        print(f"dng gpu: {error}", file=sys.stderr)
        return 1
    return 0


def checked(device: str) -> Iterator[tuple[str, str]]:
    """Whether guidance waits for the device: torch refuses every operation that does, along a run of DNG."""
    if device == "cpu":
        yield "waits for the device", "not checked: there is no GPU here"
        return
    network, info = open_denoiser("mnist")
    run = partial(guided_run, network.to(device), DDPMSchedule.named(chain_name(info)), device)
    run()  # the first run loads kernels, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        ours = [f for f in traceback.extract_tb(error.__traceback__) if PACKAGE_FOLDER in Path(f.filename).parents][-1]
        yield "waits for the device", f"yes, in {Path(ours.filename).name}, line {ours.lineno}: {ours.line}"
    else:
        yield "waits for the device", f"no ({GUIDED_STEPS} steps, {GUIDED_BATCH} images)"
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def guided_run(network: UNet, chain: DDPMSchedule, device: str) -> None:
    """DNG on a label-conditional network, with all noise made on the device."""
    levels = ddpm_sigmas(chain, GUIDED_STEPS)
    guidance, predict = NegativeGuidance([Settings()], Chain(levels)), LabelConditional(network, chain, 0)
    x = levels[0] * torch.randn(GUIDED_BATCH, *image_shape(network), device=device)
    for start, end in zip(levels, [*levels[1:], 0.0], strict=True):
        reference, undesired = predict(x, start)
        denoised = guidance(x, start, reference, reference, undesired)
        x = denoised + end / start * (x - denoised)


def measured(args: argparse.Namespace, device: str) -> Iterator[tuple[str, str]]:
    """The table of ``dng bench``."""
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    options = [
        "--repeats",
        args.repeats,
        "--timed-steps",
        args.timed_steps,
        "--batch",
        args.batch,
        "--device",
        device.split(":")[0],
    ]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        failed = bench.run(parser.parse_args(["experiment", *map(str, options)]))
    if failed:
        raise ValueError("the measurement failed, for the reason above")
    yield "speed", "\n" + printed.getvalue()


def trained(args: argparse.Namespace, plan: TrainingPlan, device: str, began: float) -> Iterator[tuple[str, Any]]:
    """A training for the time that is left, and what came out."""
    left = TRAINED * (args.minutes - (time.monotonic() - began) / 60)
    if left <= 0:
        raise ValueError(f"no time is left to train: give more --minutes than {args.minutes:g}")
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    start = ["--start-from", args.start_from] if args.start_from else []
    where = ["--data", args.data, "--output", args.output, "--device", device.split(":")[0]]
    train.train(
        parser.parse_args([str(a) for a in (args.plan, *where, *start, "--minutes", max(round(left, 3), 0.001))])
    )
    record = read_json(args.output / f"{plan.name}.json")
    yield "images a second in training", record["images_per_second"]
    seen = record["steps"] * plan.training.batch_size / record["data"]["images"]
    yield "trained", f"{record['steps']} steps, {seen:.1f} epochs, loss {record['loss']:.4f}"
    weights = args.output / f"{plan.name}.safetensors"
    network, info = load_denoiser(weights)
    chain, classes = DDPMSchedule.named(chain_name(info)), len(info.class_names)
    network.to(device)
    labels = torch.arange(classes).repeat_interleave(SHOWN)
    drawn = unguided(network, chain, SHOWN, SAMPLING_STEPS, 0)[0]
    rows: Sequence[torch.Tensor] = [drawn, *labelled_images(network, chain, labels, SAMPLING_STEPS, 0).split(SHOWN)]
    sheet(rows).save(args.output / f"{plan.name}.png")
    yield "weights", str(weights)


def markdown(found: dict[str, Any]) -> str:
    """The findings as a page."""
    return "# `dng gpu`\n\n" + "\n".join(f"**{name}**: {value}\n" for name, value in found.items())
