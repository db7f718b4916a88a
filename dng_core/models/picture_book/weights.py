"""Weights of the picture book, one safetensors file for text encoder and U-Net, and one for the judge."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...schedules import ChainName, DDPMSchedule
from ..networks import check_within_bounds
from ..weight_files import SHIPPED, Numbers, filled, read_weights, reading, tuples, write_weights
from .judge import Judge
from .networks import FOLD, CrossUNetConfig, PictureBook, TextConfig
from .scenes import PLACES, THINGS, TIMES
from .words import LENGTH, TOKENS, WORDS

KIND, JUDGE_KIND = "picture_book", "picture_book_judge"
FULL_NAME = "picture book"  # what its calibration calls it
SHIPPED_PICTURE_BOOK = SHIPPED / "picture_book.safetensors"
SHIPPED_JUDGE = SHIPPED / "picture_book_judge.safetensors"


@dataclass(frozen=True)
class PictureBookInfo:
    """What the file says: the networks, the training chain's name, and the words in the order of their tokens."""

    text: TextConfig
    unet: CrossUNetConfig
    schedule: ChainName = "linear"
    words: tuple[str, ...] = WORDS

    def __post_init__(self) -> None:
        _check_texts("words", self.words)

    def check_fits(self) -> None:
        """ValueError where the networks take other shapes than prompts and pictures have, or do not fit together."""
        for name, found, wanted in (
            ("words", self.text.words, TOKENS),
            ("length", self.text.length, LENGTH),
            ("in_channels", self.unet.in_channels, 3 * FOLD**2),
            ("context_dim", self.unet.context_dim, self.text.width),
        ):
            if found != wanted:
                raise ValueError(f"{name} must be {wanted}, not {found}")


@dataclass(frozen=True)
class JudgeInfo:
    """What a judge's file says: the network's width, and what it tells, in the order of its outputs."""

    width: int
    labels: tuple[str, ...] = (*PLACES, *TIMES, *THINGS)

    def __post_init__(self) -> None:
        check_within_bounds(self, width=1024)
        _check_texts("labels", self.labels)


def save_picture_book(
    path: Path, state_dict: Mapping[str, Tensor], info: PictureBookInfo, numbers: Numbers = "float32"
) -> None:
    """Write the weights of a :class:`PictureBook`, as ``save_denoiser`` does a denoiser's."""
    write_weights(path, state_dict, KIND, info, numbers)


def load_picture_book(path: Path) -> tuple[PictureBook, PictureBookInfo]:
    """Read a picture book, in evaluation mode and without gradients, on the CPU.

    Raises
    ------
    FileNotFoundError: if there is no such file.
    ValueError: if it is damaged, holds something else, was trained with other words, or doesn't fit its networks.
    """
    state_dict, raw = read_weights(path, KIND)
    with reading(path):
        text, unet = (tuples(raw.pop(part)) for part in ("text", "unet"))
        info = PictureBookInfo(TextConfig(**text), CrossUNetConfig(**unet), **tuples(raw))
        DDPMSchedule.named(info.schedule)
    if info.words != WORDS:
        raise ValueError(
            f"{path} was trained with other words than this version of DNG has ({', '.join(info.words)}): take the "
            f"weights that came with this version, or train them with `dng train picture_book`"
        )
    with reading(path):
        info.check_fits()
    return filled(path, lambda: PictureBook(info.text, info.unet), state_dict), info


def save_judge(path: Path, state_dict: Mapping[str, Tensor], info: JudgeInfo, numbers: Numbers = "float32") -> None:
    """Write the weights of a :class:`Judge`."""
    write_weights(path, state_dict, JUDGE_KIND, info, numbers)


def load_judge(path: Path = SHIPPED_JUDGE) -> Judge:
    """Read a judge, by default the one that comes with the project; errors as :func:`load_picture_book`."""
    state_dict, raw = read_weights(path, JUDGE_KIND)
    with reading(path):
        info = JudgeInfo(**tuples(raw))
    if info.labels != JudgeInfo(info.width).labels:
        raise ValueError(
            f"{path} tells other things than this version of DNG draws ({', '.join(info.labels)}): take the weights "
            f"that came with this version, or train them with `dng train picture_book_judge`"
        )
    return filled(path, lambda: Judge(info.width), state_dict)


def _check_texts(name: str, found: object) -> None:
    if not isinstance(found, tuple) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{name} must be a list of texts, not {found!r}")
