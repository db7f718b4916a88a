"""Temporary folders go with their owner, or with the next one; those of others are left alone."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dng_core.headless.scratch import LOCK, scratch_folder

ROOT = Path(__file__).resolve().parents[2]
HOLD = (
    "import pathlib, sys\n"
    "from dng_core.headless.scratch import scratch_folder\n"
    "with scratch_folder('dng-', *map(pathlib.Path, sys.argv[1:])) as x: print(x, flush=True); input()"
)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system's folder of temporary folders, with two that are not the project's own."""
    folder = tmp_path / "tmp"
    for name in ("dng-holiday", "other"):
        (folder / name).mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def age(folder: Path) -> None:
    os.utime(folder / LOCK, (0, 0))


def test_a_scratch_folder_is_deleted_at_the_end(temporary: Path) -> None:
    with scratch_folder("dng-") as mine:
        assert mine.name in names(temporary)
    assert names(temporary) == {"dng-holiday", "other"}


@pytest.mark.parametrize("named", [False, True])
def test_what_a_killed_process_left_is_deleted_by_the_next(temporary: Path, named: bool) -> None:
    precious = temporary.parent / "precious"
    precious.mkdir()
    (precious / "file").touch()
    environment = {**os.environ, "TMPDIR": str(temporary.parent if named else temporary), "PYTHONPATH": str(ROOT)}
    parent = [temporary] if named else []
    command = [sys.executable, "-c", HOLD, *parent]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        left = Path(owner.stdout.readline().strip())
        (left / "link").symlink_to(precious)
        age(left)
        with scratch_folder("dng-", *parent):
            assert left.is_dir()  # its owner lives
        owner.kill()
    with scratch_folder("dng-", *parent):
        assert not left.exists()
    assert (precious / "file").is_file()
    assert names(temporary) == {"dng-holiday", "other"}
