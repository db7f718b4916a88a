"""`python -m dng_core`: the same command line as `dng`."""

from dng_core.headless.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
