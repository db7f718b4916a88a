"""``dng calibrate``: measures temperature and drift of a denoiser, or of the picture book, on unguided images."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from ..calibration import explained
from ..calibration_files import save_calibration
from ..studies.calibrating import calibrated_denoiser
from ..studies.picture_book.calibrating import calibrated_book

BOOK = "picture_book"  # the shipped text-to-image model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``dng calibrate``."""
    parser.description = (
        "Draw images without guidance, and measure how far the evidence of a label-conditional denoiser counts and "
        "how much its posterior sinks. A file NAME.calibration.json beside the weights NAME.safetensors is what "
        "`calibrated = true` in an experiment reads."
    )
    parser.add_argument("denoiser", help=f"a shipped denoiser (mnist …), a file of `dng train`, or {BOOK}")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--images", type=int, default=64, help="images to draw (default: 64)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Measure, write and explain; returns 1, with a message, if that cannot be done."""
    try:
        with tqdm(total=args.images, unit="image") as bar:
            run = (args.images, args.steps, args.seed, bar.update)
            measured = calibrated_book(*run) if args.denoiser == BOOK else calibrated_denoiser(args.denoiser, *run)
        save_calibration(args.output, measured)
    except (OSError, ValueError) as error:
        print(f"dng calibrate: {error}", file=sys.stderr)
        return 1
    print(explained(measured.calibration))
    return 0
