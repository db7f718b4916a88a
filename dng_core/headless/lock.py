"""A lock between processes that the system itself releases when its holder dies."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

if os.name == "nt":
    import msvcrt

    def _try_lock(file: IO[bytes]) -> bool:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
else:
    import fcntl

    def _try_lock(file: IO[bytes]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextmanager
def exclusive(path: Path, poll_seconds: float = 1.0, wait: bool = True) -> Iterator[None]:
    """Hold the lock file `path`, after waiting for any other process that holds it.

    Raises BlockingIOError instead of waiting if not `wait`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        waiting = False
        while not _try_lock(file):
            if not wait:
                raise BlockingIOError(f"another process holds {path}")
            if not waiting:
                print(f"Waiting for another process to release {path}", file=sys.stderr, flush=True)
                waiting = True
            time.sleep(poll_seconds)
        yield
