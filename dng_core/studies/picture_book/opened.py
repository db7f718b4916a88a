"""A picture book as the studies take it: the model on its chain, its calibration, and the judge."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ...calibration import EXACT, Calibration
from ...calibration_files import load_calibration
from ...models.picture_book.judge import Judge
from ...models.picture_book.networks import PictureBook
from ...models.picture_book.weights import SHIPPED_JUDGE, SHIPPED_PICTURE_BOOK, load_judge, load_picture_book
from ...models.predictors import Precision, in_precision
from ...models.weight_files import calibration_of
from ...schedules import DDPMSchedule


@dataclass(frozen=True)
class OpenedBook:
    """``digests``: of the files, so that other weights, another judge or another calibration are another study."""

    book: PictureBook
    chain: DDPMSchedule
    judge: Judge
    calibration: Calibration
    digests: tuple[str, ...]


def open_book(weights: Path | None, precision: Precision = "float32") -> OpenedBook:
    """The shipped picture book, or another one by its weights; its calibration is the file beside them, if any."""
    path = weights or SHIPPED_PICTURE_BOOK
    book, info = load_picture_book(path)
    measured = calibration_of(path)
    calibration = load_calibration(measured).calibration if measured.is_file() else EXACT
    files = [file for file in (path, SHIPPED_JUDGE, measured) if file.is_file()]
    digests = tuple(hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files)
    chain = DDPMSchedule.named(info.schedule)
    return OpenedBook(in_precision(book, precision), chain, load_judge(), calibration, digests)
