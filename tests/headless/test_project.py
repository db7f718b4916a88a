"""What the project promises of itself: a bare Python can start it, and it moves nobody's packages."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import dng_core
from dng_core.headless.environment import LAUNCHER
from dng_core.headless.install import COMFYUI_PINS, TOOLS_PINS, managed, write_marker
from dng_core.headless.locate import Location
from dng_core.headless.paths import venv_python

from ..cli.bare_python import bare_python

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_a_bare_python_runs_a_workflow_in_the_installed_comfyui(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: Location, workflow_file: Callable[..., Path]
) -> None:
    monkeypatch.setenv("DNG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))  # no comfy-cli there
    for name in ("DNG_COMFYUI", "DNG_SERVER", "DNG_COMFYUI_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    installation = managed()
    python = venv_python(installation.environment)
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    shutil.copytree(fake.path, installation.comfyui)
    write_marker(installation, [])
    workflow, out = workflow_file("Done"), tmp_path / "out"
    done = bare_python(str(LAUNCHER), "run", str(workflow), "--cpu", "--output", str(out))
    assert done.returncode == 0, done.stderr
    assert str(installation.comfyui) in done.stderr
    assert (out / "record.json").is_file()


def test_a_package_that_the_installed_comfyui_lacks_is_named_with_the_repair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: Location, workflow_file: Callable[..., Path]
) -> None:
    monkeypatch.setenv("DNG_CACHE", str(tmp_path / "cache"))
    installation = managed()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", installation.environment], check=True)
    shutil.copytree(fake.path, installation.comfyui)
    write_marker(installation, [])
    done = bare_python(str(LAUNCHER), "run", str(workflow_file("Done")), "--install", "--cpu")
    assert done.returncode == 1
    assert done.stderr == (
        f"dng: {installation.location.python} lacks aiohttp and tqdm.\nRepair it with `dng install --reinstall`.\n"
    )


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import dng_core; print(*sys.modules)"
    done = bare_python("-c", code, str(ROOT))
    assert "dng_core" in done.stdout.split()
    assert not {"torch", "numpy", "argparse"} & set(done.stdout.split())


def test_the_version_is_the_same_everywhere() -> None:
    assert PROJECT["project"]["version"] == dng_core.__version__


def test_an_install_never_moves_a_users_torch_or_front_end() -> None:
    required = PROJECT["project"]["dependencies"]
    assert not [entry for entry in required if re.search(r"[<~!]|==", entry)]
    assert not any("frontend" in entry for entry in required)
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z-]+", line) for line in lines if not line.startswith("#"))


def test_the_name_does_not_claim_to_be_comfyuis() -> None:
    assert "comfyui" not in PROJECT["project"]["name"].lower()


@pytest.mark.parametrize("pins", [COMFYUI_PINS, TOOLS_PINS])
def test_every_pin_is_a_release_with_hashes(pins: Path) -> None:
    text = pins.read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) > 30
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+( ; [^#]*?)?(\s+--hash=sha256:[0-9a-f]{64})+", line) for line in lines)


def test_the_pins_cover_what_the_install_asks_for() -> None:
    wanted = COMFYUI_PINS.with_suffix(".in").read_text().splitlines()
    tools = [entry for name in ("test", "browser") for entry in PROJECT["project"]["optional-dependencies"][name]]
    comfyui, both = pinned(COMFYUI_PINS), pinned(COMFYUI_PINS) | pinned(TOOLS_PINS)
    assert {plain(line) for line in wanted if not line.startswith("#")} <= comfyui
    assert {plain(entry) for entry in tools if "[" not in entry} <= both
    assert {line for line in wanted if "==" in line} <= set(re.findall(r"^\S+==\S+", COMFYUI_PINS.read_text(), re.M))


def plain(requirement: str) -> str:
    return re.split(r"[ <>=;]", requirement)[0].lower().replace("_", "-")


def pinned(pins: Path) -> set[str]:
    return {plain(line) for line in pins.read_text().splitlines() if "==" in line}


def test_the_root_of_the_pack_is_not_importable() -> None:
    assert ROOT not in [Path(entry).resolve() for entry in sys.path]
