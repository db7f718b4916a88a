"""Run a Python program (SCRIPT, or -m MODULE, and its arguments) for as long as the process that started it lives.

Run as a script by the Python that the program needs; the standard library only. The parent holds the other end of
standard input and writes nothing there: when that end closes, the parent is gone, however it went, and so is every
reason to run on.
"""

import os
import runpy
import signal
import sys
import threading


def end_with_parent() -> None:
    """Wait for the end of standard input, then end this process and all that it started."""
    while os.read(0, 1024):
        pass
    if os.name == "posix":
        os.killpg(0, signal.SIGKILL)  # the parent made this process the leader of a group of its own
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    if sys.argv[1] == "-m":
        sys.argv = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = sys.argv[1:]
        # -P kept this file's folder off the path; a script's own folder comes first there, and ComfyUI relies on it.
        sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
        runpy.run_path(sys.argv[0], run_name="__main__")
