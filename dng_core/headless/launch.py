"""Start the command line in an interpreter where dng_core is not installed, leaving sys.path alone.

Run as a script. The package is loaded from where this file lies and registered under its name; the folder that holds
it stays off sys.path, for beside it lies nodes/, which would hide ComfyUI's module of that name.
"""

import importlib
import importlib.util
import sys
from pathlib import Path


def load_dng_core() -> None:
    """Load dng_core from this file's checkout and register it as `dng_core`."""
    folder = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location("dng_core", folder / "__init__.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"dng_core cannot be loaded from {folder}")
    package = importlib.util.module_from_spec(spec)
    sys.modules["dng_core"] = package
    spec.loader.exec_module(package)


if __name__ == "__main__":
    load_dng_core()
    raise SystemExit(importlib.import_module("dng_core.cli.main").main())
