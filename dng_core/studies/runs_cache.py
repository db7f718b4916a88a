"""The runs of an experiment in a folder: for each point its images (.npz) and, written last, its measures (.json).

The batches of a point that is not whole yet have files of their own.
A file appears whole or not at all, so a run that was stopped, or whose disk was full, loses nothing that was done.
"""

import io
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_json, write_json, write_whole
from .class_removal import Batch, Drawn, Point, joined


class RunsCache:
    """``folder``/runs/KEY.npz and KEY.json, for :meth:`Point.key`; KEY.START.npz for a batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "runs"

    def has(self, point: Point) -> bool:
        """Whether the point's images are there."""
        return self._images(point).is_file()

    def load(self, point: Point) -> Drawn:
        """The images of a point; ValueError if the file is damaged (then it is to be removed and drawn again)."""
        return _load(self._images(point), point.key())

    def store(self, point: Point, drawn: Drawn) -> None:
        """Keep a point's images, in place of those of its batches."""
        _store(self._images(point), drawn, point.key())
        for batch in point.batches():
            self._batch(batch).unlink(missing_ok=True)

    def missing(self, point: Point) -> list[Batch]:
        """The batches to draw of an unfinished point: those without a file, or the last if all have one."""
        batches = point.batches()
        return [batch for batch in batches if not self._batch(batch).is_file()] or batches[-1:]

    def add(self, batch: Batch, drawn: Drawn) -> Drawn | None:
        """Return the whole point if only this batch was missing; otherwise store the batch and return None."""
        others = [other for other in batch.point.batches() if other != batch]
        if not all(self._batch(other).is_file() for other in others):
            _store(self._batch(batch), drawn, _name(batch))
            return None
        return joined([drawn if b == batch else _load(self._batch(b), _name(b)) for b in batch.point.batches()])

    def measures(self, point: Point, measured_with: str) -> dict[str, Any] | None:
        """What :meth:`Measurer.measure` made of a point, if it was ``measured_with`` this classifier and data."""
        record = self.record(point.key(), measured_with)
        return None if record is None else record["measures"]

    def record(self, key: str, measured_with: str) -> dict[str, Any] | None:
        """What is known of the point with a key; None where it is not measured so, or its record is damaged."""
        try:
            record: dict[str, Any] = read_json(self.folder / f"{key}.json")
            measures = record["measures"]
            whole = Point.from_dict(record["point"]).key() == key and all(
                {"forbidden_share", "histogram"} <= of.keys() for of in measures["by_class"].values()
            )
            whole = whole and isinstance(measures["classes"], list)
            return record if whole and record["measured_with"] == measured_with else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None

    def store_measures(self, point: Point, measured_with: str, measures: dict[str, Any]) -> None:
        """Keep a point's measures."""
        record = {"point": point.to_dict(), "measured_with": measured_with, "measures": measures}
        write_json(self._record(point), record)

    def _images(self, point: Point) -> Path:
        return self.folder / f"{point.key()}.npz"

    def _batch(self, batch: Batch) -> Path:
        return self.folder / f"{_name(batch)}.npz"

    def _record(self, point: Point) -> Path:
        return self.folder / f"{point.key()}.json"


def _name(batch: Batch) -> str:
    return f"{batch.point.key()}.{batch.start}"


def _load(path: Path, name: str) -> Drawn:
    """The images that were stored under a name; files of before names were stored have none, and are believed."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        seconds = float(arrays.pop("seconds"))
        stored = str(arrays.pop("name", name))
        drawn = Drawn(**arrays, seconds=seconds)
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and give the same command again") from error
    if stored != name:
        raise ValueError(f"{path} holds the images of {stored}: remove it, and give the same command again")
    return drawn


def _store(path: Path, drawn: Drawn, name: str) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **asdict(drawn), name=np.array(name))
    write_whole(path, buffer.getvalue())
