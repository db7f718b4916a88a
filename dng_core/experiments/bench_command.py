"""``dng bench``: how fast the experiment draws, against a plain loop, and which change brings how much."""

import argparse
import contextlib
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..guidance import NegativeGuidance
from ..sampling import Predictor, ddpm_sample
from ..schedules import DDPMSchedule, ddpm_sigmas
from ..settings import Settings
from .checkpoints import open_denoiser
from .class_removal import chain_name
from .figures_command import line
from .networks import GroupNorm, UNet, channels_last
from .predictors import LabelConditional, denoised


@dataclass(frozen=True)
class Variant:
    """One way to evaluate the two predictions; each has what the one before it has."""

    name: str
    predict: Predictor
    torch_group_norm: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``dng bench``."""
    parser.description = (
        "Measure images per second of the label-conditional network under DNG, against a plain float32 loop that "
        "evaluates the two predictions one after the other. All variants take turns in one run; medians are printed."
    )
    parser.add_argument("--denoiser", default="mnist", help="a label-conditional network (default: mnist)")
    parser.add_argument("--batch", type=int, default=64, help="images drawn at once (default: 64)")
    parser.add_argument("--steps", type=int, default=1000, help="sampling steps that the rate is for (default: 1000)")
    parser.add_argument("--timed-steps", type=int, default=10, help="steps actually timed (default: 10)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each variant (default: 5)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 with a message if it cannot be measured."""
    try:
        if min(args.batch, args.steps, args.timed_steps, args.repeats) < 1:
            raise ValueError("--batch, --steps, --timed-steps and --repeats must be at least 1")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device; use --device cpu")
        device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
        unet, info = open_denoiser(args.denoiser)
        chain = DDPMSchedule.named(chain_name(info))
        seconds = timings(variants(unet.to(device), chain), chain, args, device)
    except (OSError, ValueError) as error:
        print(f"dng bench: {error}", file=sys.stderr)
        return 1
    threads = torch.get_num_threads()
    print(
        f"{args.batch} images at once, {device}, {threads} threads, torch {torch.__version__}, {args.steps} steps:\n"
    )
    print(
        line(["variant", "images per second", "against plain", "against the one before"]), line(["---"] * 4), sep="\n"
    )
    plain = previous = next(iter(seconds.values()))
    for name, taken in seconds.items():
        rate = args.batch / (taken / args.timed_steps * args.steps)
        print(line([name, rate, f"{plain / taken:.2f} x", f"{previous / taken:.2f} x"]))
        previous = taken
    return 0


def variants(unet: UNet, chain: DDPMSchedule) -> list[Variant]:
    """From the plain loop to what the experiment does, one change at a time; ValueError without labels."""
    fast, plain = channels_last(copy.deepcopy(unet)), unet
    together = LabelConditional(fast, chain, 0)
    return [
        Variant("plain loop", in_turn(plain, chain, plain_denoised), True),
        Variant("+ channels last", in_turn(fast, chain, denoised), True),
        Variant("+ group normalisation by sums", in_turn(fast, chain, denoised), False),
        Variant("+ both predictions in one batch", together, False),
    ]


def in_turn(network: UNet, chain: DDPMSchedule, predict: Callable[..., Tensor]) -> Predictor:
    """The null label's prediction, then that of class 0."""

    def both(x: Tensor, sigma: float) -> tuple[Tensor, list[Tensor]]:
        null, undesired = (torch.full((len(x),), k, device=x.device) for k in (network.config.num_classes, 0))
        return predict(network, chain, x, sigma, null), [predict(network, chain, x, sigma, undesired)]

    return both


def plain_denoised(network: UNet, chain: DDPMSchedule, x: Tensor, sigma: float, label: Tensor) -> Tensor:
    """:func:`~.predictors.denoised` in torch's default layout."""
    timestep = int(chain.timestep(torch.tensor(sigma, dtype=torch.float64)))
    epsilon = network(x / (1 + sigma**2) ** 0.5, torch.full((len(x),), timestep, device=x.device), label)
    return (x - sigma * epsilon).clamp(-1, 1)


@torch.no_grad()
def timings(compared: list[Variant], chain: DDPMSchedule, args: argparse.Namespace, device: str) -> dict[str, float]:
    """The median seconds that each variant takes for ``args.timed_steps`` steps, after one untimed turn."""
    config = open_denoiser(args.denoiser)[0].config
    shape = (args.batch, config.in_channels, config.image_size, config.image_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    levels = ddpm_sigmas(chain, max(args.timed_steps, 2))[: args.timed_steps]
    taken: dict[str, list[float]] = {variant.name: [] for variant in compared}
    for turn in range(args.repeats + 1):
        for variant in compared:
            with _group_norm(variant.torch_group_norm):
                began = time.perf_counter()
                guidance = NegativeGuidance([Settings()], chain, levels=levels)
                ddpm_sample(variant.predict, noise, levels, guidance, torch.Generator().manual_seed(1))
                if device == "cuda":
                    torch.cuda.synchronize()
                if turn:
                    taken[variant.name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


@contextlib.contextmanager
def _group_norm(torchs: bool) -> Iterator[None]:
    """Group normalisation by torch's own kernel, where that is asked for."""
    ours = GroupNorm.forward
    if torchs:
        setattr(GroupNorm, "forward", nn.GroupNorm.forward)  # noqa: B010 (mypy forbids the assignment)
    try:
        yield
    finally:
        setattr(GroupNorm, "forward", ours)  # noqa: B010
