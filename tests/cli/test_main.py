"""The command line starts on a bare Python, explains itself, and says what it does not know."""

import argparse
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dng_core
from dng_core.cli import figures, main
from dng_core.cli.main import COMMANDS
from dng_core.headless.environment import LAUNCHER
from dng_core.headless.errors import HeadlessError

from .bare_python import bare_python

ROOT = Path(__file__).resolve().parents[2]
ONLY_WITH = """
import importlib, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

command, root, *blocked = sys.argv[1:]
sys.meta_path.insert(0, Missing())
sys.path.insert(0, root)
importlib.import_module(f"dng_core.cli.{command}")
"""


def distributions_behind(names: set[str]) -> set[str]:
    """Distributions of these names and all that they require here, without their extras."""
    found: set[str] = set()
    waiting = set(names)
    while waiting:
        found.add(name := waiting.pop())
        try:
            required = [Requirement(text) for text in requires(name) or ()]
        except ModuleNotFoundError:
            continue
        needed = {r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})}
        waiting |= {canonicalize_name(name) for name in needed} - found
    return found


def test_the_command_line_starts_on_a_bare_python() -> None:
    done = bare_python(str(LAUNCHER), "--help")
    assert done.returncode == 0, done.stderr
    assert all(command.name in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("arguments", [["dng_core/__main__.py"], ["-m", "dng_core"], ["-m", "pack.dng_core"]])
def test_the_command_line_starts_by_its_path_and_as_a_part_of_the_pack(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "pack").symlink_to(ROOT)
    (tmp_path / "dng_core").symlink_to(ROOT / "dng_core")
    done = subprocess.run(
        [sys.executable, "-S", "-E", *arguments, "--version"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == f"dng {dng_core.__version__}\n", done.stderr


@pytest.mark.parametrize("command", ["run", "install", "test"])
def test_the_commands_that_install_explain_themselves_on_a_bare_python(command: str) -> None:
    done = bare_python(str(LAUNCHER), command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"dng {command}" in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_command_starts_with_the_librarys_packages_and_what_it_says_it_needs(command: main.Command) -> None:
    """No other installed package can be imported: one that is missing must be named, not found by a traceback."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    owners = packages_distributions()
    allowed = {Requirement(text).name for text in project["dependencies"]}
    allowed |= {owner for module in command.needs for owner in owners[module]}
    known = distributions_behind({canonicalize_name(name) for name in allowed})
    blocked = [module for module, of in owners.items() if not known & {canonicalize_name(name) for name in of}]
    arguments = [sys.executable, "-P", "-c", ONLY_WITH, command.name, str(ROOT), *blocked]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_arguments_of_the_test_command_reach_pytest() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from dng_core.cli import main, test\n"
        "test.run = lambda args: print(args.passed_on) or 0\n"
        "raise SystemExit(main.main(['test', '-k', 'posterior', 'tests/headless', '-q']))"
    )
    done = bare_python("-c", code, str(ROOT))
    assert done.stdout == "['-k', 'posterior', 'tests/headless', '-q']\n", done.stderr


def test_an_argument_that_a_command_does_not_know_is_refused() -> None:
    done = bare_python(str(LAUNCHER), "install", "--fast")
    assert done.returncode == 2
    assert "unrecognized arguments: --fast" in done.stderr


def test_a_server_without_aiohttp_and_without_an_install_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = tmp_path / "w.json"
    workflow.write_text('{"1": {"class_type": "A", "inputs": {}}}')
    monkeypatch.setenv("DNG_CACHE", str(tmp_path / "empty"))
    done = bare_python(str(LAUNCHER), "run", str(workflow), "--server", "127.0.0.1:1")
    assert done.returncode == 1
    assert "needs aiohttp and tqdm" in done.stderr
    assert "pip install aiohttp tqdm" in done.stderr


@pytest.mark.parametrize(("module", "package"), [("tqdm", "tqdm"), ("PIL", "pillow")])
def test_a_small_module_that_is_missing_starts_no_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str, package: str
) -> None:
    monkeypatch.setenv("DNG_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(main, "missing_modules", lambda names: [name for name in names if name == module])
    monkeypatch.setattr(main, "ensure_installed", lambda: pytest.fail("nothing may be installed"))
    assert main.main(["figures", "posterior"]) == 1
    assert f"dng figures needs {package}.\nInstall it: " in (told := capsys.readouterr().err)
    assert f"-m pip install {package}" in told


def test_a_figure_of_the_pack_without_the_pack_starts_no_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "checkout", lambda: None)
    monkeypatch.setattr(figures, "ensure_installed", lambda: pytest.fail("nothing may be installed"))
    with pytest.raises(HeadlessError, match="run it in a checkout"):
        figures.comfyui_and_pack(argparse.Namespace(comfyui=None))
