"""The runs of an experiment in a folder: for each point its images (.npz) and, written last, its measures (.json).

A file appears whole or not at all, so a run that was stopped, or whose disk was full, loses nothing that was done.
"""

import io
import json
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .class_removal import Drawn, Point
from .files import write_json, write_whole


class RunsCache:
    """``folder``/runs/KEY.npz and KEY.json, for :meth:`Point.key`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "runs"

    def has(self, point: Point) -> bool:
        """Whether the point's images are there."""
        return self._images(point).is_file()

    def load(self, point: Point) -> Drawn:
        """The images of a point; ValueError if the file is damaged (then it is to be removed and drawn again)."""
        path = self._images(point)
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            seconds = float(arrays.pop("seconds"))
            return Drawn(**arrays, seconds=seconds)
        except (zipfile.BadZipFile, ValueError, KeyError, TypeError, EOFError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, and give the same command again") from error

    def store(self, point: Point, drawn: Drawn) -> None:
        """Keep a point's images."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **asdict(drawn))
        write_whole(self._images(point), buffer.getvalue())

    def measures(self, point: Point, measured_with: str) -> dict[str, Any] | None:
        """What :meth:`Measurer.measure` made of a point, if it was ``measured_with`` this classifier and data."""
        try:
            record = json.loads(self._record(point).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        measures: dict[str, Any] | None = record["measures"] if record.get("measured_with") == measured_with else None
        return measures

    def store_measures(self, point: Point, measured_with: str, measures: dict[str, Any]) -> None:
        """Keep a point's measures."""
        record = {"point": point.to_dict(), "measured_with": measured_with, "measures": measures}
        write_json(self._record(point), record)

    def _images(self, point: Point) -> Path:
        return self.folder / f"{point.key()}.npz"

    def _record(self, point: Point) -> Path:
        return self.folder / f"{point.key()}.json"
