"""`python -m dng_core`: the same command line as `dng`."""

import platform
import sys

if sys.version_info < (3, 11):  # noqa: UP036 (said here, before an older Python trips over the import below)
    sys.exit(f"dng: this is Python {platform.python_version()}; Python 3.11 or newer is needed.")

from dng_core.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
