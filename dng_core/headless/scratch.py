"""Temporary folders that are deleted at the end, or else by the next run of this project. Standard library only."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .lock import exclusive

LOCK = ".dng-scratch"  # the file that a folder's owner holds, for as long as it lives
OLD_SECONDS = 60.0  # a folder younger than this may belong to a process that is about to take its lock: a choice


@contextlib.contextmanager
def scratch_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A new temporary folder in `parent`, or in the system's; those whose owners were killed are deleted first."""
    parent = parent or Path(tempfile.gettempdir())
    remove_all_left(prefix, parent)
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as name,
        exclusive(Path(name) / LOCK, wait=False),
    ):
        yield Path(name)


def remove_all_left(prefix: str, parent: Path) -> None:
    """Delete the folders of this module's in `parent`, with this prefix, whose owners live no more."""
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            remove_if_left(folder)


def remove_if_left(folder: Path) -> None:
    """Delete a folder of this module's whose owner lives no more; OSError where it is none, or its owner lives."""
    status = (folder / LOCK).lstat()
    if folder.is_symlink() or time.time() - status.st_mtime < OLD_SECONDS:
        return
    with exclusive(folder / LOCK, wait=False):
        if os.name == "posix":
            shutil.rmtree(folder, ignore_errors=True)
            return
    shutil.rmtree(folder, ignore_errors=True)  # Windows deletes no file that is open
