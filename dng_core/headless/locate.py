"""Find the ComfyUI to run in, and the Python that runs it. Standard library only: this runs before any install."""

import configparser
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import HeadlessError
from .paths import venv_python

MANAGED = "the ComfyUI installed by this project"  # the origin of that location
REINSTALL = "Repair it with `dng install --reinstall`."
PROBE_SECONDS = 300  # a first import of torch can be slow: a choice


@dataclass(frozen=True)
class Location:
    """A ComfyUI on this machine: its folder, the interpreter that runs it, and how it was found."""

    path: Path
    python: Path
    origin: str

    @property
    def remedy(self) -> str:
        """What to do where a package is missing or broken."""
        if self.origin == MANAGED:
            return REINSTALL
        return "Name the Python of that ComfyUI with --comfyui-python or DNG_COMFYUI_PYTHON, or use --install."


def find_comfyui(
    path: Path | None = None, python: Path | None = None, environ: Mapping[str, str] = os.environ
) -> Location | None:
    """The ComfyUI named by `path`, else by DNG_COMFYUI, else comfy-cli's default workspace; None where there is none.

    Raises HeadlessError where a place is named and holds no ComfyUI, or where no Python is found that can run it.
    """
    for candidate, origin in (
        (path, "--comfyui"),
        (environ.get("DNG_COMFYUI"), "DNG_COMFYUI"),
        (comfy_cli_workspace(), "comfy-cli's default workspace"),
    ):
        if candidate:
            folder = comfyui_folder(Path(candidate), origin)
            return Location(folder, find_python(folder, python, environ), origin)
    return None


def comfyui_folder(folder: Path, origin: str) -> Path:
    """`folder` as an absolute path; raises HeadlessError where it does not hold ComfyUI's main.py."""
    folder = folder.expanduser().absolute()
    if not (folder / "main.py").is_file():
        raise HeadlessError(
            f"{origin} names {folder}, which is not a ComfyUI: there is no main.py in it.",
            "Give the folder that holds ComfyUI's main.py, or use --install to run in one that this project installs.",
        )
    return folder


def find_python(comfyui: Path, python: Path | None, environ: Mapping[str, str] = os.environ) -> Path:
    """The Python that runs `comfyui`: `python`, DNG_COMFYUI_PYTHON, an environment beside it, or this interpreter."""
    named = python or environ.get("DNG_COMFYUI_PYTHON")
    if named:
        # The link is not resolved: a virtual environment's interpreter is a link that works only by its own name.
        interpreter = Path(named).expanduser().absolute()
        if not interpreter.is_file():
            raise HeadlessError(
                f"There is no Python at {interpreter}.", "Correct --comfyui-python or DNG_COMFYUI_PYTHON."
            )
        return interpreter
    beside = [venv_python(comfyui / ".venv"), venv_python(comfyui / "venv")]
    beside.append(comfyui.parent / "python_embeded" / "python.exe")  # Windows' portable ComfyUI spells it so
    return next((candidate for candidate in beside if candidate.is_file()), Path(sys.executable))


def has_accelerator(location: Location) -> bool:
    """Whether torch sees a GPU (CUDA, ROCm, Intel's or Apple's) from the interpreter that runs ComfyUI.

    Raises HeadlessError where that interpreter cannot import torch, because it is then not ComfyUI's own.
    """
    code = (
        "import torch\n"
        "mps = torch.backends.mps.is_available()\n"
        "xpu = hasattr(torch, 'xpu') and torch.xpu.is_available()\n"
        "print('accelerator' if mps or xpu or torch.cuda.is_available() else 'cpu')"
    )
    try:
        probe = subprocess.run(
            [location.python, "-c", code], capture_output=True, text=True, timeout=PROBE_SECONDS, cwd=location.path
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HeadlessError(f"{location.python} does not run: {error}", "Name another: --comfyui-python.") from error
    if probe.returncode:
        last_line = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        raise HeadlessError(
            f"{location.python} cannot run the ComfyUI in {location.path}: importing torch fails ({last_line}).",
            location.remedy,
        )
    return probe.stdout.strip().endswith("accelerator")


def comfy_cli_workspace(home: Path | None = None) -> Path | None:
    """The default workspace set with `comfy set-default`, if comfy-cli's configuration names one that still exists."""
    home = home or Path.home()
    folder = {
        "win32": home / "AppData" / "Local" / "comfy-cli",
        "darwin": home / "Library" / "Application Support" / "comfy-cli",
    }.get(sys.platform, home / ".config" / "comfy-cli")
    configuration = configparser.ConfigParser(interpolation=None)
    try:
        configuration.read(folder / "config.ini", encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return None
    workspace = configuration.defaults().get("default_workspace")
    return Path(workspace) if workspace and (Path(workspace) / "main.py").is_file() else None
