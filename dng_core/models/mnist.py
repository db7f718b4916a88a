"""MNIST from the four IDX files, gzipped or not, checked against the published MD5 sums."""

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MNIST_MD5 = {  # of the uncompressed files; source: torchvision.datasets.MNIST, yann.lecun.com
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def load_mnist(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """MNIST images, (n, 1, 28, 28) uint8, and labels, (n,) long.

    Raises
    ------
    FileNotFoundError: if an IDX file (plain or .gz) is not in ``folder``.
    ValueError: if a file's contents are not MNIST's.
    """
    split = "train" if train else "t10k"
    images = np.frombuffer(_read_idx(folder, f"{split}-images-idx3-ubyte"), np.uint8, offset=16)
    labels = np.frombuffer(_read_idx(folder, f"{split}-labels-idx1-ubyte"), np.uint8, offset=8)
    return torch.tensor(images).view(-1, 1, 28, 28), torch.tensor(labels, dtype=torch.long)


def images_digest(images: Tensor, labels: Tensor) -> str:
    """A hash of images, uint8, and their labels."""
    digest = hashlib.sha256(images.numpy().tobytes())
    digest.update(labels.numpy().tobytes())
    return digest.hexdigest()[:24]


def to_model_range(images: Tensor) -> Tensor:
    """uint8 pixels 0 .. 255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def _read_idx(folder: Path, name: str) -> bytes:
    plain, packed = folder / name, folder / f"{name}.gz"
    if plain.is_file():
        content = plain.read_bytes()
    elif packed.is_file():
        try:
            content = gzip.decompress(packed.read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{packed} is damaged ({error}); fetch it again") from error
    else:
        raise FileNotFoundError(f"no {name} or {name}.gz in {folder}: give the folder that holds MNIST's IDX files")
    if hashlib.md5(content).hexdigest() != MNIST_MD5[name]:
        raise ValueError(f"{name} in {folder} is not MNIST's (its MD5 differs); fetch it again")
    return content
