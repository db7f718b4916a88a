"""Make a folder appear under another name without copying it."""

import os
from pathlib import Path


def link_folder(folder: Path, link: Path) -> None:
    """Make `link` lead to `folder`: a symbolic link, or on Windows a junction, which needs no privilege."""
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(folder), str(link))  # type: ignore[attr-defined]
    else:
        link.symlink_to(folder, target_is_directory=True)


def unlink_folder(link: Path) -> None:
    """Remove the link and leave what it leads to alone."""
    if os.name == "nt":
        link.rmdir()
    else:
        link.unlink()
