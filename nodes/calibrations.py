"""Calibrations in ComfyUI: where they are kept, and which model each belongs to."""

import os
import re
from pathlib import Path

import folder_paths

from ..dng_core.calibration_files import ModelCalibration, load_calibration, save_calibration
from ..dng_core.models.picture_book.weights import FULL_NAME
from ..dng_core.models.weight_files import shipped_calibrations
from .picture_book import PictureBookModel
from .pixel_models import PixelModel

REMEDY = "connect the calibration of this model and size, from Load Calibration (DNG) or Calibrate Model (DNG)"
NAME = re.compile(r"[\w][\w .+-]{0,99}")
LONGEST = 200
"""Bytes of a name. A file system takes 255, and an ending and a number are added."""
SHIPPED_PREFIX = "shipped: "


def model_name(model) -> str:
    """What a MODEL is to a calibration: the name of one of our own, or its kind, prediction and number of parameters.

    Checkpoints of one architecture share a name, and models that differ by a LoRA too.
    """
    inner = model.model
    if isinstance(inner, PixelModel):
        return inner.info.full_name
    if isinstance(inner, PictureBookModel):
        return FULL_NAME
    parameters = sum(parameter.numel() for parameter in inner.diffusion_model.parameters())
    return f"{type(inner).__name__}, {inner.model_type.name}, {parameters} parameters"


def folder() -> Path:
    """The folder of the user's calibrations."""
    return Path(folder_paths.get_user_directory()) / "dng_calibrations"


def known() -> list[str]:
    """The names of all calibrations: those that come with the pack first, then the user's."""
    files = sorted(path.stem for path in folder().glob("*.json")) if folder().is_dir() else []
    return [*(SHIPPED_PREFIX + name for name in shipped_calibrations()), *files]


def load(name: str) -> ModelCalibration:
    """A calibration by its name in :func:`known`; ValueError, naming the input `name`, if it is no good."""
    if name.startswith(SHIPPED_PREFIX):
        path = shipped_calibrations().get(name.removeprefix(SHIPPED_PREFIX))
        if path is None:
            raise ValueError(f"no calibration {name!r} comes with DNG; choose another in `name`")
    else:
        check_name(name, "name")
        path = folder() / f"{name}.json"
    try:
        return load_calibration(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}; or choose another in `name`, which is {name!r}") from error


def save(name: str, measured: ModelCalibration) -> Path:
    """Keep a calibration in the user's folder. One of that name that is there already stays, and a number is added.

    Raises
    ------
    ValueError: naming the input `save_as`, for a name that no file should have, or where nothing can be written.
    """
    check_name(name, "save_as")
    number, path = 1, folder() / f"{name}.json"
    try:
        while os.path.lexists(path):
            number += 1
            path = folder() / f"{name} {number}.json"
        save_calibration(path, measured)
    except OSError as error:
        raise ValueError(
            f"the calibration cannot be kept as {path} ({error}); empty `save_as`, or make room"
        ) from error
    return path


def check_name(name: str, given: str) -> None:
    """Raise ValueError, naming the input that it was given to, for a name that no calibration should have."""
    if not NAME.fullmatch(name) or name.endswith((".", " ")) or len(name.encode()) > LONGEST:
        raise ValueError(
            f"`{given}` is {name!r}; give a name of at most 100 letters, digits, spaces, dots and dashes that begins "
            f"with a letter or a digit, and that takes at most {LONGEST} bytes"
        )
