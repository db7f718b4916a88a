"""Labelled images to train and measure on: MNIST, CIFAR-10, and any folder of images sorted into classes.

Each is read whole into memory, (n, channels, height, width) uint8. MNIST and the original CIFAR-10 are checked against
their published checksums.
"""

import io
import itertools
import zipfile
import zlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .mnist import MNIST_MD5, images_digest, load_mnist

DATASETS = ("mnist", "cifar10", "folder")
DIGITS = tuple("0123456789")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_JPEG = "cifar10_jpeg.npz"
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
JPEG_NOTE = "CIFAR-10 re-encoded as JPEG, not the original pixels"


@dataclass(frozen=True)
class Dataset:
    """Labelled images: uint8 (n, channels, height, width), labels (n,) long, and the classes' names.

    ``note``: a remark that every result on these data must carry; "" for original data.
    """

    name: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    note: str = ""

    def without(self, label: int) -> "Dataset":
        """All images but those of one class."""
        return self.where(self.labels != label)

    def only(self, label: int) -> "Dataset":
        """The images of one class."""
        return self.where(self.labels == label)

    def where(self, chosen: Tensor) -> "Dataset":
        """The images that a boolean or index tensor chooses."""
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def sample(self, most: int, seed: int = 0) -> "Dataset":
        """At most ``most`` images, chosen at random by ``seed``, in their original order."""
        if most >= len(self.images):
            return self
        chosen = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))[:most]
        return self.where(chosen.sort().values)

    def digest(self) -> str:
        """A hash of images and labels."""
        return images_digest(self.images, self.labels)


def load_dataset(name: str, folder: Path, train: bool, download: bool = False, size: int | None = None) -> Dataset:
    """One split of a data set from local files.

    Parameters
    ----------
    name: "mnist" (four IDX files), "cifar10" (the original's ``cifar-10-batches-py``, or ``cifar10_jpeg.npz``), or
        "folder": images as ``folder/CLASS/*``, or ``folder/train/CLASS/*`` and ``folder/test/CLASS/*``.
    download: fetch MNIST or CIFAR-10 with torchvision where it is not in the folder.
    size: the side to which a folder's images are cropped and scaled; None takes that of the first image.

    Raises
    ------
    FileNotFoundError: if files are missing.
    ValueError: if files are damaged or of another data set, or if there is only one class.
    """
    if name == "mnist":
        downloaded = folder / "MNIST" / "raw"  # where torchvision puts it
        found = next((place for place in (folder, downloaded) if _holds_mnist(place)), None)
        if found is None and download:
            _download("MNIST", folder)
        return Dataset("MNIST", *load_mnist(found or (downloaded if downloaded.is_dir() else folder), train), DIGITS)
    if name == "cifar10":
        return _cifar10(folder, train, download)
    if name == "folder":
        return _image_folder(folder, train, size)
    raise ValueError(f"there is no data set {name!r}: choose one of {', '.join(DATASETS)}")


def _holds_mnist(folder: Path) -> bool:
    return all(any((folder / f"{file}{end}").is_file() for end in ("", ".gz")) for file in MNIST_MD5)


def _download(name: str, folder: Path) -> None:
    """Let torchvision fetch and check a data set."""
    try:
        from torchvision import datasets
    except ModuleNotFoundError as error:
        raise ValueError(f"to download {name}, torchvision is needed: pip install torchvision") from error
    try:
        getattr(datasets, name)(root=str(folder), train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{name} could not be downloaded into {folder} ({error}): try again, or copy its files there"
        ) from error


def _cifar10(folder: Path, train: bool, download: bool) -> Dataset:
    if (folder / CIFAR10_JPEG).is_file():
        images, labels = _jpeg_arrays(folder / CIFAR10_JPEG, "train" if train else "test")
        return Dataset("CIFAR-10 (JPEG)", images, labels, CIFAR10_CLASSES, JPEG_NOTE)
    if download:
        _download("CIFAR10", folder)
    try:
        from torchvision.datasets import CIFAR10
    except ModuleNotFoundError as error:
        raise ValueError("to read the original CIFAR-10, torchvision is needed: pip install torchvision") from error
    try:
        original = CIFAR10(root=str(folder), train=train, download=False)  # checks the MD5 of every file
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"no whole CIFAR-10 in {folder}: it needs cifar-10-batches-py with its published checksums, or "
            f"{CIFAR10_JPEG} (with --download, torchvision fetches the original)"
        ) from error
    images = torch.from_numpy(np.ascontiguousarray(original.data.transpose(0, 3, 1, 2)))
    return Dataset("CIFAR-10", images, torch.tensor(original.targets), CIFAR10_CLASSES)


def _jpeg_arrays(path: Path, split: str) -> tuple[Tensor, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            stream, offsets, labels = (file[f"{split}_{part}"] for part in ("jpeg", "offset", "label"))
        files = [stream[a:b].tobytes() for a, b in itertools.pairwise(offsets)]
        pictures = [np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content in files]
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or half-downloaded ({error}): copy it again") from error
    return images, torch.from_numpy(labels.astype(np.int64))


def _image_folder(folder: Path, train: bool, size: int | None) -> Dataset:
    split = folder / ("train" if train else "test")
    has_splits = (folder / "train").is_dir() or (folder / "test").is_dir()
    root = split if has_splits else folder
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    names = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir()))
    if len(names) < 2:
        raise ValueError(
            f"{root} holds {len(names)} class folders ({', '.join(names)}); to remove a class from the others, at "
            f"least two are needed, each a folder of images named after its class"
        )
    files = [(path, i) for i, name in enumerate(names) for path in sorted((root / name).iterdir()) if _is_image(path)]
    if empty := [name for i, name in enumerate(names) if i not in {label for _, label in files}]:
        raise ValueError(f"no images ({', '.join(IMAGE_ENDINGS)}) in the class folders {', '.join(empty)} of {root}")
    pictures: list[np.ndarray] = []
    read = partial(_read_image, size=size)
    for path, _ in files:
        pictures.append(read(path))
        if pictures[-1].shape != pictures[0].shape:
            raise ValueError(f"{path} has another size than {files[0][0]}: give a size to scale them all to")
    stacked = torch.from_numpy(np.stack(pictures))
    if bool((stacked[..., :1] == stacked).all()):
        stacked = stacked[..., :1]  # all images are grey
    images = stacked.permute(0, 3, 1, 2).contiguous()
    lossy = any(path.suffix.lower() in (".jpg", ".jpeg") for path, _ in files)
    labels = torch.tensor([label for _, label in files])
    return Dataset(folder.name, images, labels, names, "JPEG images" if lossy else "")


def _is_image(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in IMAGE_ENDINGS


def _read_image(path: Path, size: int | None) -> np.ndarray:
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} is no whole image ({error}): remove or replace it") from error
    if size is None and picture.width == picture.height:
        return np.asarray(picture)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return np.asarray(square if size is None else square.resize((size, size), Image.Resampling.LANCZOS))
