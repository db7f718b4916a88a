"""``dng bench``: how fast the experiment draws, and how long the nodes take in ComfyUI, against what is comparable."""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..economy import Economy
from ..guidance import NegativeGuidance
from ..headless.figures.speed_prompts import MODELS, SIZES, SMALL, subjects
from ..headless.paths import BENCH_NODES, checkout
from ..models.checkpoints import open_denoiser
from ..models.devices import devices, machine
from ..models.networks import UNet
from ..models.predictors import LabelConditional, denoised
from ..posterior import Chain
from ..sampling import Predictor, ddpm_sample
from ..schedules import DDPMSchedule, ddpm_sigmas
from ..settings import Settings
from ..studies.class_removal import chain_name, image_shape, starting_noise
from ..studies.report.markdown import line, table_lines

LATENTS: dict[str, tuple[tuple[int, ...], float]] = {
    "Stable Diffusion 1.5, 512 x 512": ((4, 64, 64), 8.03e11),
    "SDXL, 1024 x 1024": ((4, 128, 128), 6.76e12),
    "Wan 2.1 1.3B, 81 frames of 832 x 480": ((16, 21, 60, 104), 2.83e14),
}
"""Shapes of latents, and the floating-point operations of one prediction for them. The operations were counted by
torch's FlopCounterMode in ComfyUI 0.30.0's own classes of these models, with 77 tokens of text (Wan: 512)."""

PRODUCT_SIZE = 1024  # a choice: large enough that a product runs near the machine's full speed
LEAST_SIZE = 64  # pixels: three times halved after the VAE's 8, sides stay whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``dng bench``."""
    parser.description = (
        "experiment: measure images per second of the label-conditional network under DNG, against a plain float32 "
        "loop that evaluates the two predictions one after the other at every step. comfyui: measure predictions, "
        "seconds and memory of a real ComfyUI for an image, with KSampler (DNG), economy off and auto, with the stock "
        "KSampler without and with a negative prompt, and with ComfyUI's own NAG and Perp-Neg where the model takes "
        "them. They all take turns; medians are printed. step: measure what guidance itself takes of a step, for "
        "latents of known models."
    )
    parser.add_argument("what", nargs="?", choices=("experiment", "comfyui", "step"), default="experiment")
    parser.add_argument("--denoiser", default="mnist", help="a label-conditional network (default: mnist)")
    parser.add_argument("--batch", type=int, help="images drawn at once (default: 64; comfyui and step: 1)")
    parser.add_argument("--steps", type=int, help="sampling steps of an image (default: 1000; comfyui: 30)")
    parser.add_argument("--timed-steps", type=int, default=10, help="steps actually timed (default: 10)")
    parser.add_argument(
        "--undesired-every",
        type=int,
        default=10,
        help="one variant predicts the undesired class once in this many steps, a divisor of --timed-steps "
        "(default: 10)",
    )
    parser.add_argument("--repeats", type=int, default=15, help="turns of each variant (default: 15)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    comfyui = parser.add_argument_group("comfyui")
    comfyui.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=SMALL,
        metavar="NAME",
        help=f"{', '.join(MODELS)}; the last two have the shape of Stable Diffusion's networks and random weights, "
        f"and take hours on a CPU unless steps and turns are few (default: {' '.join(SMALL)})",
    )
    comfyui.add_argument(
        "--size",
        type=int,
        help="width and height in pixels that "
        + " and ".join(f"{name} (default: {of})" for name, of in SIZES.items())
        + " draw",
    )
    comfyui.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    comfyui.add_argument(
        "--comfyui", type=Path, metavar="FOLDER", help="the ComfyUI to use (default: as for `dng run`)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; returns 1, with a message, if it cannot be measured."""
    batch, steps = {"comfyui": (1, 30), "step": (1, 1000)}.get(args.what, (64, 1000))
    args.batch = batch if args.batch is None else args.batch
    args.steps = steps if args.steps is None else args.steps
    return {"comfyui": in_comfyui, "step": step, "experiment": experiment}[args.what](args)


def in_comfyui(args: argparse.Namespace) -> int:
    """The nodes in a real ComfyUI, a new one for each model. Rows are printed as they are measured."""
    from ..headless.figures.speed_figures import measure_speeds
    from ..headless.install import ensure_installed
    from ..headless.locate import find_comfyui
    from ..headless.server import comfyui_server

    pack = checkout()
    if why := _unfit(args):
        print(f"dng bench: {why}", file=sys.stderr)
        return 1
    if pack is None or not (pack / BENCH_NODES).is_dir():
        print("dng bench: run it in a clone of the project's repository", file=sys.stderr)
        return 1
    location = find_comfyui(args.comfyui) or ensure_installed()
    print(
        f"{args.batch} at once, {args.steps} steps of euler_ancestral, {args.repeats} turns, on {machine()}, torch "
        f"{torch.__version__}:\n"
    )
    head: list[str] = []
    left_out: list[str] = []
    for model in dict.fromkeys(args.models):
        with comfyui_server(location, pack, further=[pack / BENCH_NODES]) as server:
            for subject in subjects(model, args.batch, args.size):
                speeds = measure_speeds(server, subject, args.batch, args.steps, args.repeats, args.seed)
                shown = [
                    [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
                    for row in speeds.rows
                ]
                lines = map(line, shown) if head else table_lines(head := list(speeds.rows[0]), shown)
                print(*lines, sep="\n", flush=True)
                left_out += speeds.left_out
    print("", *left_out, sep="\n")
    return 0


def _unfit(args: argparse.Namespace) -> str:
    """Why the options make no benchmark of ComfyUI; "" if they do."""
    if min(args.batch, args.steps, args.repeats - 1) < 1:
        return "--batch and --steps must be at least 1, --repeats at least 2"
    if args.size is not None and not set(SIZES) & set(args.models):
        return f"--size is of the models {' and '.join(SIZES)}: name one in --models"
    if args.size is not None and (args.size < LEAST_SIZE or args.size % LEAST_SIZE):
        return f"--size must be a multiple of {LEAST_SIZE}, not {args.size}"
    return ""


def experiment(args: argparse.Namespace) -> int:
    """The experiment's own sampler."""
    try:
        _check_numbers(args)
        if args.timed_steps % args.undesired_every:
            raise ValueError(
                f"--timed-steps {args.timed_steps} is no multiple of --undesired-every {args.undesired_every}: the "
                "undesired class would be predicted too often"
            )
        device = devices(args.device)[0]
        unet, info = open_denoiser(args.denoiser)
        chain = DDPMSchedule.named(chain_name(info))
        compared = variants(unet.to(device), chain, args.undesired_every)
        shape, alone = image_shape(unet), LabelConditional(unet, chain, None)
        tasks = [sampling(predict, n, shape, chain, args, device, between=alone) for predict, n in compared.values()]
        tasks += [sampling(no_network, 1, shape, chain, args, device, guided) for guided in (True, False)]
        *turns, own, sampler, products = timings([*tasks, matrix_product(device)], args.repeats, device)
    except (OSError, ValueError) as error:
        print(f"dng bench: {error}", file=sys.stderr)
        return 1
    threads = torch.get_num_threads()
    print(
        f"{args.batch} images at once, {device}, {threads} threads, torch {torch.__version__}, {args.steps} steps:\n"
    )
    print(*table_lines(["variant", "images per second", "against plain", "half of the turns"], []), sep="\n")
    for name, taken in zip(compared, turns, strict=True):
        rate = args.batch / (median(taken) / args.timed_steps * args.steps)
        low, ratio, high = quantiles([plain / other for plain, other in zip(turns[0], taken, strict=True)], n=4)
        print(line([name, f"{rate:.4g}", f"{ratio:.2f} x", f"{low:.2f} .. {high:.2f}"]))
    guidance = [both - bare for both, bare in zip(own, sampler, strict=True)]
    share = median(mine / whole for mine, whole in zip(guidance, turns[1], strict=True))
    print(
        f"\nPosterior, scale and push take {median(guidance) / args.timed_steps * 1e3:.2f} ms a step.\n"
        f"That is {share:.1%} of the loop with both predictions in one batch. The sampler itself takes "
        f"{median(sampler) / args.timed_steps * 1e3:.2f} ms."
    )
    flops = flops_of_a_prediction(unet)
    plain, batched = (2 * args.batch * args.timed_steps * flops / median(taken) / 1e9 for taken in turns[:2])
    most = 2 * PRODUCT_SIZE**3 / median(products) / 1e9
    print(
        f"\nOne prediction takes {flops / 1e6:.0f} million operations. In 10^9 operations a second:",
        f"the plain loop does {plain:.0f}, one batch {batched:.0f}, "
        f"a product of two {PRODUCT_SIZE} x {PRODUCT_SIZE} matrices {most:.0f}.",
        f"A loop at the rate of that product would be {most / plain:.2f} x as fast as the plain loop.",
        sep="\n",
    )
    return 0


def step(args: argparse.Namespace) -> int:
    """Guidance alone, beside what a prediction of known models takes at least."""
    try:
        _check_numbers(args)
        device = devices(args.device)[0]
    except ValueError as error:
        print(f"dng bench: {error}", file=sys.stderr)
        return 1
    print(f"{args.batch} latents at once, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}:\n")
    print(*table_lines(["latent", "elements", "guidance, ms a step", "of two predictions, at most"], []), sep="\n")
    chain = DDPMSchedule.named("linear")
    for name, (shape, operations) in LATENTS.items():
        tasks = [sampling(no_network, 1, shape, chain, args, device, guided) for guided in (True, False)]
        *turns, products = timings([*tasks, matrix_product(device)], args.repeats, device)
        seconds = median((both - bare) / args.timed_steps for both, bare in zip(*turns, strict=True))
        share = seconds / (2 * args.batch * operations * median(products) / (2 * PRODUCT_SIZE**3))
        print(line([name, f"{math.prod(shape):,}", f"{seconds * 1e3:.2f}", f"{share:.5%}"]), flush=True)
    print(
        f"\nThe last column is a bound. It takes predictions to run as fast as a product of two {PRODUCT_SIZE} x "
        f"{PRODUCT_SIZE} matrices\nin float32, which is about as fast as this machine computes."
    )
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    if min(args.batch, args.steps, args.timed_steps, args.undesired_every, args.repeats - 1) < 1:
        raise ValueError("--batch and the numbers of steps must be at least 1, --repeats at least 2")


def variants(unet: UNet, chain: DDPMSchedule, every: int) -> dict[str, tuple[Predictor, int]]:
    """The predictions of a plain loop, and those of the experiment at each step or once in ``every`` steps.

    ValueError if the network knows no labels.
    """
    together = LabelConditional(unet, chain, 0)

    def in_turn(x: Tensor, sigma: float) -> tuple[Tensor, list[Tensor]]:
        null, undesired = (torch.full((len(x),), k, device=x.device) for k in (unet.config.num_classes, 0))
        return denoised(unet, chain, x, sigma, null), [denoised(unet, chain, x, sigma, undesired)]

    return {
        "plain loop": (in_turn, 1),
        "both predictions in one batch": (together, 1),
        f"the undesired one once in {every} steps": (together, every),
    }


def no_network(x: Tensor, sigma: float) -> tuple[Tensor, list[Tensor]]:
    """Two predictions that differ and cost nothing: what is left of a step is the guidance and the sampler."""
    return 0.5 * x, [0.49 * x]


def sampling(
    predict: Predictor,
    every: int,
    shape: tuple[int, ...],
    chain: DDPMSchedule,
    args: argparse.Namespace,
    device: str,
    guided: bool = True,
    between: Predictor | None = None,
) -> Callable[[], object]:
    """A run of ``args.timed_steps`` steps from ``args.batch`` latents of noise, with DNG or without guidance."""
    noise = starting_noise(0, args.batch, 0, shape)[0].to(device)
    levels = ddpm_sigmas(chain, max(args.timed_steps, 2))[: args.timed_steps]

    def run() -> None:
        economies = [Economy.every(every)]
        guidance = NegativeGuidance([Settings()], Chain(levels), economies=economies) if guided else None
        ddpm_sample(predict, noise, levels, guidance, torch.Generator().manual_seed(1), between=between)

    return run


def matrix_product(device: str) -> Callable[[], object]:
    """A product of two square matrices: about as fast as this machine computes."""
    matrix = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, device=device)
    return lambda: matrix @ matrix


@torch.no_grad()
def timings(tasks: Sequence[Callable[[], object]], repeats: int, device: str) -> list[list[float]]:
    """The seconds of each task in each turn, after one untimed turn."""
    taken: list[list[float]] = [[] for _ in tasks]
    for turn in range(repeats + 1):
        for task, seconds in zip(tasks, taken, strict=True):
            began = time.perf_counter()
            task()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:
                seconds.append(time.perf_counter() - began)
    return taken


@torch.no_grad()
def flops_of_a_prediction(network: UNet) -> float:
    """Multiplications and additions of convolutions and matrix products, for one image."""
    device = network.conv_in.weight.device
    x = torch.zeros(1, *image_shape(network), device=device)
    zero = torch.zeros(1, dtype=torch.long, device=device)
    with FlopCounterMode(display=False) as counter:
        network(x, zero, zero)
    return counter.get_total_flops()
