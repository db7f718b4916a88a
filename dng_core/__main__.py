"""`python -m dng_core`, or this file by its path: the same command line as `dng`."""

import platform
import runpy
import sys
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 (said here, before an older Python trips over an import)
    sys.exit(f"dng: this is Python {platform.python_version()}; Python 3.11 or newer is needed.")

if __name__ == "__main__":
    if __package__ == "dng_core":
        from dng_core.cli.main import main

        raise SystemExit(main())
    # Started by its path, Python has put this folder onto sys.path, where its modules would hide others. Started as a
    # part of the pack (`-m PACK.dng_core`), the package has another name. The launcher loads it under its own.
    folder = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != folder]
    runpy.run_path(str(folder / "headless" / "launch.py"), run_name="__main__")
