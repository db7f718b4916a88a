"""The exception that the command line turns into a message instead of a traceback, and how a full disk is told."""

import re

# As Linux, macOS and Windows put it.
FULL_DISK = re.compile(r"\[Errno 28\]|No space left on device|not enough space on the disk")
FULL_DISK_REMEDY = (
    "Free some space, or name other folders: --output for results and log, TMPDIR for what ComfyUI writes meanwhile."
)


class HeadlessError(Exception):
    """Something the user can act on: what went wrong, and what to do about it."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}\n{remedy}" if remedy else problem)
        self.problem = problem
        self.remedy = remedy
