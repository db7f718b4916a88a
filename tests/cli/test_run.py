"""`dng run`: where its results go, and what it refuses before anything is started."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path

import pytest

from dng_core.cli import run
from dng_core.headless.errors import HeadlessError


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
