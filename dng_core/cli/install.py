"""`dng install`: have the pinned ComfyUI ready."""

import argparse

from ..headless.install import COMFYUI_VERSION, ensure_installed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments; DNG_CACHE moves the installation."""
    parser.description = (
        f"Install ComfyUI {COMFYUI_VERSION}, with its own Python environment, into the user's cache (DNG_CACHE moves "
        "it). Nothing is done where it is there already."
    )


def run(args: argparse.Namespace) -> int:
    """Install, and print where."""
    location = ensure_installed()
    print(f"ComfyUI: {location.path}\nPython:  {location.python}")
    return 0
