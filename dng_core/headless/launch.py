"""Start the command line in an interpreter where dng_core is not installed, leaving sys.path alone.

This file is run as a script. It loads the package that it lies in and registers the package under its name. The
checkout stays off sys.path, because its folder nodes/ would hide ComfyUI's module of that name.
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
