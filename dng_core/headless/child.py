"""Run a Python program (SCRIPT, or -m MODULE, and its arguments) for as long as the process that started it lives.

The Python that the program needs runs this file as a script, so only the standard library is imported. The parent
holds the other end of standard input and writes nothing there. When that end closes, the parent has ended, whatever
the reason, and the program must end too.
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
        # ComfyUI needs its own folder first on the path, as for any script. -P has kept this file's folder off it.
        sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
        runpy.run_path(sys.argv[0], run_name="__main__")
