"""What CI runs, with stand-ins for the programs that it calls: a browser is brought, and failures count."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None or sys.platform == "win32", reason="CI's script is one for bash")


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """The only programs that the script finds: each says that it was called. There is no browser among them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("dirname", "chmod"):
        (folder / name).symlink_to(str(shutil.which(name)))
    write(folder / "id", "echo 0")
    write(folder / "python3", 'echo "python3 $* with ${DNG_BROWSER:-no browser}"')
    return folder


def write(path: Path, script: str) -> None:
    path.write_text(f"#!{BASH}\n{script}\n")
    path.chmod(0o755)


def ci(programs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = [str(BASH), str(ROOT / ".ci" / "run"), *arguments]
    return subprocess.run(script, env={"PATH": str(programs)}, capture_output=True, text=True)


def test_the_oldest_comfyui_is_tested_after_the_pinned_one(programs: Path) -> None:
    whole, oldest = ci(programs).stdout.splitlines()
    assert whole == "python3 -m dng_core test with no browser"
    assert oldest.startswith("python3 -m dng_core test --comfyui-version oldest tests/nodes/")
    named = [argument.partition("::")[0] for argument in oldest.split() if argument.startswith(("tests/", '"tests/'))]
    assert named and all((ROOT / name).is_file() for name in named)


def test_arguments_go_to_the_test_command_alone(programs: Path) -> None:
    assert ci(programs, "-k", "x").stdout == "python3 -m dng_core test -k x with no browser\n"


def test_a_browser_that_is_there_must_be_tested_with(programs: Path) -> None:
    write(programs / "chromium", "")
    write(programs / "apt-get", "exit 1")
    assert ci(programs, "-q").stdout == f"python3 -m dng_core test -q with {programs / 'chromium'}\n"


def test_root_on_debian_gets_a_chromium(programs: Path) -> None:
    copy = f'case "$*" in *install*chromium) echo "#!{BASH}" >{programs}/chromium; chmod +x {programs}/chromium;; esac'
    write(programs / "apt-get", copy)
    assert ci(programs, "-q").stdout == f"python3 -m dng_core test -q with {programs / 'chromium'}\n"


@pytest.mark.parametrize("apt_get", ["exit 1", "exit 0"])
def test_a_chromium_that_does_not_come_fails(programs: Path, apt_get: str) -> None:
    write(programs / "apt-get", apt_get)
    done = ci(programs)
    assert done.returncode == 1 and done.stdout == ""


def test_a_failure_with_the_pinned_comfyui_is_not_passed_by(programs: Path) -> None:
    write(programs / "python3", 'echo "$*"; exit 3')
    done = ci(programs)
    assert done.returncode == 3 and done.stdout == "-m dng_core test\n"
