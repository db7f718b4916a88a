"""`dng test`: lint, type check and test this checkout in the environment of the installed ComfyUI."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from ..files import write_whole
from ..headless.errors import HeadlessError
from ..headless.install import TOOLS_PINS, ensure_installed, managed, pip_install, tell
from ..headless.link import link_folder, unlink_folder
from ..headless.lock import exclusive
from ..headless.paths import PACKAGE_FOLDER, checkout
from ..headless.releases import NEWEST, OLDEST, RELEASES, comfyui_release, front_end, front_end_of
from ..headless.scratch import scratch_folder

ALIAS = "dynamic_negative_guidance"
GRACE_SECONDS = 15  # a choice
NODE_TESTS, BROWSER_TESTS = "tests/nodes", "tests/browser"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to test against. Everything else goes to pytest."""
    parser.description = (
        "Install what the tests need, then run ruff, mypy and pytest on this checkout, all with the Python of the "
        "ComfyUI that this project installs. The tests use that ComfyUI, or the source that DNG_COMFYUI names. "
        "Against another release, only pytest runs."
    )
    parser.usage = "dng test [-h] [--comfyui-version VERSION] [--frontend-version VERSION] [pytest's arguments]"
    parser.add_argument(
        "--comfyui-version",
        metavar="VERSION",
        help=f"test against that release of ComfyUI and its own front end ({OLDEST}, or {', '.join(RELEASES)}); by "
        f"default {NODE_TESTS}",
    )
    parser.add_argument(
        "--frontend-version",
        metavar="VERSION",
        help=f"test against that release of ComfyUI's front end, or the {NEWEST}; by default {BROWSER_TESTS}",
    )


def run(args: argparse.Namespace) -> int:
    """Lint, types and tests, in that order; returns the status of the first that fails.

    Raises HeadlessError where dng_core is installed as a library only: the tests are in the checkout.
    """
    root = checkout()
    if root is None:
        raise HeadlessError(f"{PACKAGE_FOLDER} is not in a checkout, and only a checkout has the tests.")
    location = ensure_installed()
    install_tools(location.python)
    environment = {**os.environ, "DNG_COMFYUI": os.environ.get("DNG_COMFYUI") or str(location.path)}
    environment.pop("PYTHONPATH", None)
    if args.comfyui_version or args.frontend_version:
        return test_release(args, location.python, root, environment)

    tell("ruff")
    status = run_tool(location.python, ["ruff", "check"], root, environment)
    if status == 0:
        tell("mypy")
        status = check_types(location.python, root, environment)
    if status == 0:
        tell("pytest")
        status = run_tool(location.python, ["pytest", *args.passed_on], root, environment)
    return status


def test_release(args: argparse.Namespace, python: Path, root: Path, environment: dict[str, str]) -> int:
    """Run pytest against the ComfyUI and the front end that ``args`` names."""
    chosen = args.passed_on or [NODE_TESTS if args.comfyui_version else BROWSER_TESTS]
    if args.comfyui_version:
        environment["DNG_COMFYUI"] = str(comfyui_release(args.comfyui_version))
    page = front_end(args.frontend_version or front_end_of(Path(environment["DNG_COMFYUI"])))
    tell(f"pytest with {environment['DNG_COMFYUI']} and {page}")
    return run_tool(python, ["pytest", *chosen], root, environment | {"DNG_FRONT_END": str(page)})


def install_tools(python: Path) -> None:
    """Install the test tools once per list of pins."""
    done = managed().environment / "tools.txt"  # an environment that is made anew has none of them yet
    wanted = TOOLS_PINS.read_text(encoding="utf-8")
    with exclusive(managed().lock):
        if not done.is_file() or done.read_text(encoding="utf-8") != wanted:
            tell("Installing the test tools")
            pip_install(python, TOOLS_PINS, "Installing the test tools")
            write_whole(done, wanted.encode())


def check_types(python: Path, root: Path, environment: dict[str, str]) -> int:
    """Run mypy on the pack as ComfyUI sees it: one package, whatever the checkout's folder is called."""
    with scratch_folder("dng-types-") as scratch:
        link = scratch / ALIAS
        link_folder(root, link)
        try:
            packages = ["-p", f"{ALIAS}.dng_core", "-p", f"{ALIAS}.nodes"]
            options = ["--config-file", str(root / "pyproject.toml"), "--cache-dir", str(root / ".mypy_cache")]
            return run_tool(python, ["mypy", *options, *packages], scratch, environment)
        finally:
            unlink_folder(link)


def run_tool(python: Path, arguments: list[str], folder: Path, environment: dict[str, str]) -> int:
    """Run `python -m ARGUMENTS` in `folder` without putting that folder on sys.path."""
    sys.stdout.flush()
    with subprocess.Popen([python, "-P", "-m", *arguments], cwd=folder, env=environment) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            try:
                process.wait(GRACE_SECONDS)  # a terminal's Ctrl-C has reached the tool too: let it clean up
            except subprocess.TimeoutExpired:
                process.terminate()
            raise
