"""Which ComfyUI is used, and with which Python."""

import sys
from pathlib import Path

import pytest

from dng_core.headless import locate
from dng_core.headless.errors import HeadlessError
from dng_core.headless.locate import Location, comfy_cli_workspace, find_comfyui, find_python, has_accelerator
from dng_core.headless.paths import cache_folder, venv_python


def make_comfyui(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "main.py").touch()
    return folder


def test_the_option_comes_before_the_variable_and_that_before_comfy_cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    option, variable, workspace = (make_comfyui(tmp_path / name) for name in ("option", "variable", "workspace"))
    monkeypatch.setattr(locate, "comfy_cli_workspace", lambda: workspace)
    environ = {"DNG_COMFYUI": str(variable)}
    found = [find_comfyui(option, environ=environ), find_comfyui(environ=environ), find_comfyui(environ={})]
    assert [location.path for location in found if location] == [option, variable, workspace]
    monkeypatch.setattr(locate, "comfy_cli_workspace", lambda: None)
    assert find_comfyui(environ={}) is None


@pytest.mark.parametrize("origin", ["--comfyui", "DNG_COMFYUI"])
def test_a_folder_without_comfyui_is_named_with_what_named_it(tmp_path: Path, origin: str) -> None:
    path = tmp_path if origin == "--comfyui" else None
    environ = {"DNG_COMFYUI": str(tmp_path)} if path is None else {}
    with pytest.raises(HeadlessError, match=rf"{origin} names {tmp_path}[\s\S]*--install"):
        find_comfyui(path, environ=environ)


def test_comfy_clis_default_workspace_is_read_from_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    workspace = make_comfyui(tmp_path / "100% mine")
    config = tmp_path / ".config" / "comfy-cli" / "config.ini"
    assert comfy_cli_workspace(tmp_path) is None
    config.parent.mkdir(parents=True)
    config.write_text(f"[DEFAULT]\ndefault_workspace = {workspace}\nenable_tracking = False\n")
    assert comfy_cli_workspace(tmp_path) == workspace
    (workspace / "main.py").unlink()
    assert comfy_cli_workspace(tmp_path) is None
    config.write_text("no section\n")
    assert comfy_cli_workspace(tmp_path) is None


def test_the_python_is_the_named_one_or_the_one_beside_comfyui_or_this_one(tmp_path: Path) -> None:
    comfyui = make_comfyui(tmp_path / "ComfyUI")
    assert find_python(comfyui, None, {}) == Path(sys.executable)
    beside = venv_python(comfyui / ".venv")
    beside.parent.mkdir(parents=True)
    beside.touch()
    assert find_python(comfyui, None, {}) == beside
    assert find_python(comfyui, None, {"DNG_COMFYUI_PYTHON": sys.executable}) == Path(sys.executable)
    with pytest.raises(HeadlessError, match="no Python at"):
        find_python(comfyui, tmp_path / "missing", {})


def test_a_python_without_torch_is_refused_with_the_remedy(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    python.chmod(0o755)
    with pytest.raises(HeadlessError, match=r"importing torch fails[\s\S]*No module named[\s\S]*--comfyui-python"):
        has_accelerator(Location(tmp_path, python, "the test"))
    with pytest.raises(HeadlessError, match=r"importing torch fails[\s\S]*Repair it with `dng install --reinstall`"):
        has_accelerator(Location(tmp_path, python, locate.MANAGED))


def test_the_cache_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNG_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
