"""`dng run`: where its results go, and what it refuses before anything is started."""

import argparse
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path

import pytest

from dng_core.cli import run
from dng_core.headless.errors import HeadlessError
from dng_core.headless.workflow import nodes_of_this_pack

ROOT = Path(__file__).resolve().parents[2]


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Stopped":
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(run, "datetime", Stopped)
    folders = [run.output_folder(None, tmp_path / "workflow") for _ in range(3)]
    assert [folder.name for folder in folders] == ["20260102-030405", "20260102-030405_2", "20260102-030405_3"]
    assert all(folder.is_dir() for folder in folders)


def test_a_named_output_folder_is_used_again(tmp_path: Path) -> None:
    assert {run.output_folder(tmp_path / "out", tmp_path) for _ in range(2)} == {tmp_path / "out"}
    (tmp_path / "file").touch()
    with pytest.raises(HeadlessError, match="file cannot be written"):
        run.output_folder(tmp_path / "file", tmp_path)


def test_a_full_output_disk_is_told_before_anything_is_started(
    tmp_path: Path, disk_full_after: Callable[[int], AbstractContextManager[None]]
) -> None:
    with disk_full_after(0), pytest.raises(HeadlessError, match=r"No space left on device\.\nFree some space"):
        run.output_folder(tmp_path / "out", tmp_path)


def dng_run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    return run.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There is no ComfyUI, and an attempt to install or to start one fails the test."""

    def never(*_: object) -> None:
        raise AssertionError("nothing may be installed or started")

    for name in ("DNG_SERVER", "DNG_COMFYUI", "DNG_COMFYUI_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DNG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dng_core.headless.locate.comfy_cli_workspace", lambda: None)
    monkeypatch.setattr(run, "ensure_installed", never)
    monkeypatch.setattr(run, "comfyui_server", never)


@pytest.fixture
def workflow(tmp_path: Path) -> Path:
    path = tmp_path / "w.json"
    path.write_text(
        '{"1": {"class_type": "KSamplerDNG", "inputs": {}}, "2": {"class_type": "SaveImage", "inputs": {}}}'
    )
    return path


@pytest.mark.parametrize("port", [70000, 0, -1])
def test_a_port_that_there_is_not_is_refused(workflow: Path, nowhere: None, port: int) -> None:
    with pytest.raises(HeadlessError, match=f"--port must lie between 1 and 65535, not {port}"):
        dng_run(workflow, "--port", port)


@pytest.mark.parametrize("options", [[], ["--install"], ["--server", "127.0.0.1:1"]])
def test_a_python_for_no_comfyui_is_refused(workflow: Path, nowhere: None, options: list[str]) -> None:
    with pytest.raises(HeadlessError, match=r"--comfyui-python names[\s\S]*--comfyui or DNG_COMFYUI"):
        dng_run(workflow, "--comfyui-python", sys.executable, *options)


def test_nodes_of_the_pack_without_the_pack_are_told_before_anything_is_started(
    workflow: Path, nowhere: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "checkout", lambda: None)
    comfyui = tmp_path / "ComfyUI"
    comfyui.mkdir()
    (comfyui / "main.py").touch()
    for options in ([], ["--comfyui", comfyui]):
        with pytest.raises(
            HeadlessError, match=r'"KSamplerDNG" \(node 1, KSamplerDNG\)\nRun it in a checkout'
        ) as caught:
            dng_run(workflow, *options)
        assert "SaveImage" not in str(caught.value)


def test_every_node_of_the_pack_is_known_by_its_class() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "nodes").rglob("*.py")]
    classes = [name for source in sources for name in re.findall(r'node_id="(\w+)"', source)]
    assert len(classes) > 10
    assert nodes_of_this_pack({name: {"class_type": name, "inputs": {}} for name in classes}) == classes
