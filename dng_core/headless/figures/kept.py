"""The rows that figures consist of, and a file of what was measured, so that a stopped figure goes on where it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...files import read_json, write_whole
from ..errors import HeadlessError

Row = dict[str, Any]
"""One row of a figure's table: its cells by the names of their columns."""


class Kept:
    """Values by their keys in a JSON file, which is written anew with every value that is added."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._values: dict[str, Any] = dict(read_json(path))
        except FileNotFoundError:
            self._values = {}
        except (ValueError, TypeError) as error:
            raise HeadlessError(
                f"{path} is damaged ({error}).", "Remove it; its figure is then measured anew."
            ) from error

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """The value of a key; where there is none yet, what ``measure`` returns, which is kept."""
        if key not in self._values:
            self._values[key] = measure()
            write_whole(self._path, json.dumps(self._values).encode())
        return self._values[key]
