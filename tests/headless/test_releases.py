"""Other releases to test against: only what is known and whole, kept for the next time, and named where it is not."""

import argparse
import os
import sys
import zipfile
from pathlib import Path

import pytest

from dng_core.cli import test as test_command
from dng_core.headless import install as installing
from dng_core.headless import releases
from dng_core.headless.errors import HeadlessError
from dng_core.headless.install import COMFYUI_VERSION
from dng_core.headless.locate import Location
from dng_core.headless.lock import exclusive
from dng_core.headless.scratch import LOCK, scratch_folder

ROOT = Path(__file__).resolve().parents[2]
WHEEL = "comfyui_frontend_package-{version}-py3-none-any.whl"
HERE = Path(sys.executable)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which a ComfyUI is installed, and a package index with two front ends."""
    monkeypatch.setenv("DNG_CACHE", str(tmp_path / "cache"))
    comfyui = tmp_path / "ComfyUI"
    comfyui.mkdir()
    (comfyui / "requirements.txt").write_text("comfyui-frontend-package==1.2.3\ncomfyui-workflow-templates==0.1\n")
    monkeypatch.setattr(releases, "ensure_installed", lambda: Location(comfyui, HERE, "the test"))
    monkeypatch.setattr(test_command, "ensure_installed", lambda: Location(comfyui, HERE, "the test"))
    index = tmp_path / "index"
    index.mkdir()
    for version in ("1.2.3", "1.10.0"):
        name = WHEEL.format(version=version)
        with zipfile.ZipFile(index / name, "w") as wheel:
            metadata = f"Metadata-Version: 2.1\nName: comfyui-frontend-package\nVersion: {version}\n"
            wheel.writestr(f"comfyui_frontend_package-{version}.dist-info/METADATA", metadata)
            wheel.writestr(f"comfyui_frontend_package-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\n")
            wheel.writestr("comfyui_frontend_package/__init__.py", "")
            wheel.writestr("comfyui_frontend_package/static/index.html", version)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return tmp_path / "cache"


def test_the_newest_front_end_is_the_one_with_the_highest_version(cache: Path) -> None:
    page = releases.front_end(releases.NEWEST)
    assert page == cache / "releases" / "front-end-1.10.0"
    assert [path.name for path in page.iterdir()] == ["index.html"]
    assert (page / "index.html").read_text() == "1.10.0"


def test_a_front_end_that_is_there_is_not_fetched_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = releases.front_end("1.2.3")
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert releases.front_end("1.2.3") == first
    assert sorted(path.name for path in first.parent.iterdir()) == ["front-end-1.2.3", "front-end.lock"]


def test_a_front_end_that_the_index_lacks_leaves_nothing_behind(cache: Path) -> None:
    with pytest.raises(HeadlessError, match="Fetching the front end failed"):
        releases.front_end("9.9.9")
    assert [path.name for path in (cache / "releases").iterdir()] == ["front-end.lock"]


def test_what_a_killed_download_left_is_deleted_and_a_running_one_is_not(cache: Path) -> None:
    """Also where everything is there already, so that nothing more is fetched."""
    releases.front_end("1.2.3")
    folder = cache / "releases"
    with scratch_folder("fetch-", folder) as running:
        left = folder / "fetch-left"
        left.mkdir()
        for owned in (running, left):
            (owned / LOCK).touch()
            os.utime(owned / LOCK, (0, 0))
        releases.front_end("1.2.3")
        assert running.is_dir() and not left.exists()


def test_a_download_that_is_killed_can_be_told_from_one_that_runs(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = []

    def download(python: Path, arguments: list[str | Path], purpose: str, variables: object = None) -> None:
        with pytest.raises(BlockingIOError), exclusive(Path(arguments[-1]) / LOCK, wait=False):
            pass
        locked.append(purpose)
        raise HeadlessError("stopped")

    monkeypatch.setattr(releases, "run_pip", download)
    monkeypatch.setattr(installing, "run_pip", download)
    for fetch in (lambda: releases.front_end("1.2.3"), lambda: releases.comfyui_release(releases.OLDEST)):
        with pytest.raises(HeadlessError, match="stopped"):
            fetch()
    assert len(locked) == 2


def test_a_comfyui_that_is_not_known_is_refused_with_those_that_are(cache: Path) -> None:
    with pytest.raises(HeadlessError, match=rf"no source of ComfyUI 0\.3\.64, but of 0\.16\.3, .*{COMFYUI_VERSION}"):
        releases.comfyui_release("0.3.64")


def test_the_oldest_release_is_the_oldest_that_the_pack_supports(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    monkeypatch.setattr(releases, "fetch_comfyui", lambda *given: fetched.append(given))
    releases.comfyui_release(releases.OLDEST)
    ((_, folder, _),) = fetched
    assert folder.name == f"comfyui-{next(iter(releases.RELEASES))}"
    assert f'OLDEST_COMFYUI = "{next(iter(releases.RELEASES))}"' in (ROOT / "__init__.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "comfyui", "page", "tests"),
    [
        ({"comfyui_version": COMFYUI_VERSION}, None, "front-end-1.2.3", ["tests/nodes"]),
        ({"frontend_version": "newest"}, None, "front-end-1.10.0", ["tests/browser"]),
        ({"frontend_version": "newest"}, "/mine", "front-end-1.10.0", ["tests/browser"]),
        ({"comfyui_version": COMFYUI_VERSION, "passed_on": ["-k", "x"]}, "/mine", "front-end-1.2.3", ["-k", "x"]),
    ],
)
def test_the_tests_get_the_release_and_its_front_end(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict,
    comfyui: str | None,
    page: str,
    tests: list[str],
) -> None:
    """A release that is named counts more than DNG_COMFYUI, and neither is linted: this checkout's sources are."""
    ran = []
    monkeypatch.setattr(test_command, "install_tools", lambda *_: None)
    monkeypatch.setattr(test_command, "run_tool", lambda *given: ran.append(given) or 0)
    monkeypatch.delenv("DNG_COMFYUI", raising=False)
    if comfyui:
        monkeypatch.setenv("DNG_COMFYUI", comfyui)
    options = {"comfyui_version": None, "frontend_version": None, "passed_on": []} | arguments
    assert test_command.run(argparse.Namespace(**options)) == 0
    ((_, command, _, environment),) = ran
    assert command == ["pytest", *tests]
    installed = str(cache.parent / "ComfyUI")
    assert environment["DNG_COMFYUI"] == (installed if "comfyui_version" in arguments else comfyui or installed)
    assert Path(environment["DNG_FRONT_END"]) == cache / "releases" / page
