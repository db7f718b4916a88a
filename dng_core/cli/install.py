"""`dng install`: have the pinned ComfyUI ready."""

import argparse

from ..headless.install import COMFYUI_VERSION, repaired


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dng install`; DNG_CACHE moves the installation."""
    parser.description = (
        f"Install ComfyUI {COMFYUI_VERSION}, with its own Python environment, into the user's cache (DNG_CACHE moves "
        "it). One that is there is looked through, and made anew if files are gone. What is yours there stays: "
        "models, custom nodes, pictures."
    )
    parser.add_argument("--reinstall", action="store_true", help="make it anew although nothing seems wrong")


def run(args: argparse.Namespace) -> int:
    """Install, and print where."""
    location = repaired(anew=args.reinstall)
    print(f"ComfyUI: {location.path}\nPython:  {location.python}")
    return 0
