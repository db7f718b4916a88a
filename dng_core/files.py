"""Files that appear whole or not at all. Standard library only: what runs before any install writes so too."""

import json
import os
from pathlib import Path
from typing import Any

PARTIAL = ".partial"  # what is added to a file's name while it is being written


def read_json(path: Path) -> Any:
    """The JSON in a file; ValueError where it is no JSON, or nested too deeply to be read."""
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """The value of a JSON text; ValueError where it is no JSON, or nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all; ValueError for NaN, which JSON does not know."""
    write_whole(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: an error on the way (a full disk) leaves what was there, and no remains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:  # "x" follows no link that lies there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
