"""Where this project keeps things: its checkout, and its folder in the user's cache."""

import os
import sys
import tomllib
from pathlib import Path

PROJECT = "dynamic-negative-guidance"
BENCH_NODES = "nodes/bench"  # of a clone: nodes that only measuring needs, which the published pack leaves out
PACKAGE_FOLDER = Path(__file__).resolve().parents[1]


def checkout() -> Path | None:
    """The folder that ComfyUI loads as a node pack, or None where only the library dng_core is installed."""
    folder = PACKAGE_FOLDER.parent
    return folder if is_pack(folder) else None


def is_pack(folder: Path) -> bool:
    """Whether `folder` is a copy of this node pack."""
    if not (folder / "__init__.py").is_file():
        return False
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False
    return isinstance(project, dict) and project.get("name") == PROJECT


def cache_folder() -> Path:
    """The folder for what is installed: DNG_CACHE, else the platform's place for a user's caches."""
    if override := os.environ.get("DNG_CACHE"):
        return Path(override).expanduser().absolute()
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / PROJECT


def venv_python(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
