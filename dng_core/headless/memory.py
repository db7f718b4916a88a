"""The most memory that a process took for a while. Linux alone tells it; nothing else is needed."""

import re
from pathlib import Path

PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)
RESET = "5"  # what Linux takes for "the peak begins anew" (man 5 proc_pid_clear_refs)


def begin_peak(pid: int) -> None:
    """Let the peak of the process begin anew, at what it holds now; without effect where that cannot be done."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text(RESET, encoding="utf-8")
    except OSError:
        return


def peak_bytes(pid: int) -> int | None:
    """The most memory that the process held since its peak began, in bytes; None where the system does not tell."""
    try:
        found = PEAK.search(Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None
