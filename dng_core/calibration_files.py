"""Calibrations as files: small JSON, which says what was measured, and on which model."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .calibration import Calibration
from .files import write_json

FORMAT = 1
LARGEST = 65536
"""A calibration has about twenty numbers. A file of more bytes than this is none."""


@dataclass(frozen=True)
class ModelCalibration:
    """A calibration, and what it was measured on.

    Parameters
    ----------
    model: the model, as the program that measured names it; "" if that is not known.
    shape: of one image's state, (channels, height, width) or with frames; () if that is not known.
    """

    calibration: Calibration
    model: str = ""
    shape: tuple[int, ...] = ()

    def check(self, model: str, shape: tuple[int, ...], remedy: str) -> None:
        """Raise ValueError, ending in ``remedy``, for a model or a latent size that this was not measured on."""
        if self.model and self.model != model:
            raise ValueError(f"the calibration is of the model {self.model!r}, and this is {model!r}: {remedy}")
        if self.shape and self.shape != shape:
            here, there = ("x".join(map(str, size)) for size in (shape, self.shape))
            raise ValueError(f"the calibration is of latents of {there}, and this one is {here}: {remedy}")


def save_calibration(path: Path, measured: ModelCalibration) -> None:
    """Write a calibration, whole or not at all."""
    write_json(path, {"dng_calibration": FORMAT, **asdict(measured)})


def load_calibration(path: Path) -> ModelCalibration:
    """Read a calibration.

    Raises
    ------
    FileNotFoundError: if there is no such file.
    ValueError: if the file is no calibration, is damaged, or has values that no measurement gives.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no calibration {path}")
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict) or raw.pop("dng_calibration", None) != FORMAT:
            raise ValueError(f'it lacks "dng_calibration": {FORMAT}')
        return _measured(raw)
    except (ValueError, TypeError, KeyError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no calibration, or is damaged ({error}): calibrate the model again") from error


def _measured(raw: dict[str, Any]) -> ModelCalibration:
    wanted = {field.name for field in fields(Calibration)}
    numbers = raw["calibration"]
    if set(raw) != {field.name for field in fields(ModelCalibration)} or set(numbers) != wanted:
        raise ValueError("it has other fields than a calibration")
    shape = tuple(raw["shape"])
    if not isinstance(raw["model"], str) or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError("model must be text, and shape whole numbers above 0")
    for name in ("images", "steps"):
        if type(numbers[name]) is not int:
            raise ValueError(f"{name} must be a whole number")
    for name in ("temperature", "least", "most"):
        if isinstance(numbers[name], bool) or not math.isfinite(numbers[name]):
            raise ValueError(f"{name} must be a finite number")
    return ModelCalibration(Calibration(**numbers), raw["model"], shape)
