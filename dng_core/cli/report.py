"""``dng report``: makes an experiment's report again from its cached runs."""

import argparse
import sys
from pathlib import Path

from ..studies.report.pages import write_reports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``dng report``."""
    parser.description = (
        "Write report.html, report.md, plots, runs.csv and runs.json from an experiment's cached runs."
    )
    parser.add_argument("folder", type=Path, help="the --output folder of `dng experiment`")


def run(args: argparse.Namespace) -> int:
    """Write the report and print its files; returns 1, with a message, if there is nothing to report."""
    try:
        for path in write_reports(args.folder):
            print(path)
    except (OSError, ValueError) as error:
        print(f"dng report: {error}", file=sys.stderr)
        return 1
    return 0
