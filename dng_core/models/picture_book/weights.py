"""Weights of the picture book: one safetensors file for the text encoder and the U-Net, which describes both."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..weight_files import SHIPPED, Numbers, filled, read_weights, reading, tuples, write_weights
from .networks import CrossUNetConfig, PictureBook, TextConfig
from .words import WORDS

KIND = "picture_book"
SHIPPED_PICTURE_BOOK = SHIPPED / "picture_book.safetensors"


@dataclass(frozen=True)
class PictureBookInfo:
    """What the file says: the networks, the training chain's name, and the words in the order of their tokens."""

    text: TextConfig
    unet: CrossUNetConfig
    schedule: str = "linear"
    words: tuple[str, ...] = WORDS


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
        model = PictureBook(info.text, info.unet)
    if info.words != WORDS:
        raise ValueError(
            f"{path} was trained with other words than this version of DNG has ({', '.join(info.words)}): take the "
            f"weights that came with this version, or train them with `dng train picture_book`"
        )
    return filled(path, model, state_dict), info
