"""Data sets are read as they are, and bad ones are named with what is wrong."""

import gzip
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dng_core.models import datasets
from dng_core.models.datasets import CIFAR10_CLASSES, CIFAR10_JPEG, Dataset, load_dataset


def save_images(folder: Path, count: int = 2, size: tuple[int, int] = (6, 6), ending: str = "png") -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((size[1], size[0], 3), 40 * i, np.uint8)).save(folder / f"{i}.{ending}")


def cifar10_jpeg(path: Path, broken: bool = False) -> None:
    arrays = {}
    for split in ("train", "test"):
        files = []
        for i in range(4):
            buffer = io.BytesIO()
            Image.fromarray(np.full((32, 32, 3), 60 * i, np.uint8)).save(buffer, "JPEG")
            files.append(buffer.getvalue()[: 20 if broken else None])
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{split}_offset"] = np.cumsum([0, *map(len, files)])
        arrays[f"{split}_label"] = np.arange(4, dtype=np.uint8)
    np.savez(path, **arrays)


def test_an_image_folder_is_its_classes(tmp_path):
    save_images(tmp_path / "cats")
    save_images(tmp_path / "dogs", 3)
    data = load_dataset("folder", tmp_path, train=True)
    assert data.class_names == ("cats", "dogs") and data.note == ""
    assert data.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.images.shape == (5, 1, 6, 6)  # grey throughout: one channel
    assert data.images[:, 0, 0, 0].tolist() == [0, 40, 0, 40, 80]
    assert data.without(0).labels.tolist() == [1, 1, 1] and len(data.only(0).images) == 2


def test_splits_of_an_image_folder_and_sizes(tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        for name in "ab":
            save_images(tmp_path / split / name, count, size=(9, 6), ending="jpg")
    assert len(load_dataset("folder", tmp_path, train=True, size=4).images) == 6
    test = load_dataset("folder", tmp_path, train=False, size=4)
    assert test.images.shape[2:] == (4, 4) and test.note == "JPEG images"


def test_a_split_that_is_not_there_is_missed_by_name(tmp_path):
    for name in "ab":
        save_images(tmp_path / "train" / name)
    with pytest.raises(FileNotFoundError, match=f"there is no folder {tmp_path / 'test'}"):
        load_dataset("folder", tmp_path, train=False)


def test_a_file_damaged_within_says_so(tmp_path):
    packed = bytearray(gzip.compress(bytes(range(256)) * 40, mtime=0))
    packed[20:60] = bytes(40)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(packed)
    with pytest.raises(ValueError, match="is damaged"):
        load_dataset("mnist", tmp_path, train=True)


@pytest.mark.parametrize("names", [[], ["only"]], ids=str)
def test_a_data_set_with_one_class_only_is_refused(tmp_path, names):
    for name in names:
        save_images(tmp_path / name)
    with pytest.raises(ValueError, match="at least two are needed"):
        load_dataset("folder", tmp_path, train=True)


def test_damaged_and_uneven_images_are_named(tmp_path):
    save_images(tmp_path / "a")
    save_images(tmp_path / "b", size=(8, 8))
    with pytest.raises(ValueError, match="another size"):
        load_dataset("folder", tmp_path, train=True)
    (tmp_path / "a" / "0.png").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"0\.png is no whole image"):
        load_dataset("folder", tmp_path, train=True)
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match=r"no images .* c of"):
        load_dataset("folder", tmp_path, train=True)


def test_cifar_10_as_jpeg_says_so(tmp_path):
    cifar10_jpeg(tmp_path / CIFAR10_JPEG)
    data = load_dataset("cifar10", tmp_path, train=True)
    assert data.images.shape == (4, 3, 32, 32) and data.class_names == CIFAR10_CLASSES
    assert "JPEG" in data.name and "not the original" in data.note
    assert (data.images[2].float() - 120).abs().max() <= 2


def test_half_downloaded_data_is_refused(tmp_path):
    cifar10_jpeg(tmp_path / CIFAR10_JPEG, broken=True)
    with pytest.raises(ValueError, match="half-downloaded"):
        load_dataset("cifar10", tmp_path, train=True)
    content = (tmp_path / CIFAR10_JPEG).read_bytes()
    (tmp_path / CIFAR10_JPEG).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="half-downloaded"):
        load_dataset("cifar10", tmp_path, train=True)


def test_the_original_cifar_10_must_have_its_checksums(tmp_path):
    pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError, match="no whole CIFAR-10"):
        load_dataset("cifar10", tmp_path, train=True)
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (batches / name).write_bytes(pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0]}))
    with pytest.raises(FileNotFoundError, match="no whole CIFAR-10"):
        load_dataset("cifar10", tmp_path, train=True)


def test_the_original_cifar_10_is_read_by_torchvision(tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")

    class Reader(torchvision.datasets.CIFAR10):
        base_folder, train_list, test_list = "batches", [["one", None]], [["two", None]]

        def _check_integrity(self) -> bool:
            return True

        def _load_meta(self) -> None:
            pass

    folder = tmp_path / "batches"
    folder.mkdir()
    pixels = np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8)
    (folder / "one").write_bytes(pickle.dumps({"data": pixels, "labels": [3, 5]}))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Reader)
    data = load_dataset("cifar10", tmp_path, train=True)
    assert data.labels.tolist() == [3, 5] and data.note == ""
    assert torch.equal(data.images.flatten(1), torch.from_numpy(pixels))


def test_a_download_that_fails_says_so_and_a_local_copy_needs_none(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_mnist", lambda folder, train: (torch.zeros(2, 1, 28, 28), torch.arange(2)))
    fetched = []

    def offline(root: str, train: bool, download: bool) -> None:
        fetched.append(root)
        raise RuntimeError("no connection")

    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setattr(torchvision.datasets, "MNIST", offline)
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        load_dataset("mnist", tmp_path, train=True, download=True)
    half = tmp_path / "MNIST" / "raw"
    half.mkdir(parents=True)
    (half / "train-images-idx3-ubyte.gz").touch()
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        load_dataset("mnist", tmp_path, train=True, download=True)
    assert fetched == [str(tmp_path)] * 2  # a download that broke off goes on where it was
    for name in datasets.MNIST_MD5:
        (half / f"{name}.gz").touch()
    load_dataset("mnist", tmp_path, train=True, download=True)
    assert len(fetched) == 2


def test_an_unknown_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="choose one of mnist, cifar10, folder"):
        load_dataset("imagenet", tmp_path, train=True)


def test_a_sample_is_the_same_every_time_and_keeps_labels_with_images():
    data = Dataset("n", torch.arange(20).view(20, 1, 1, 1).to(torch.uint8), torch.arange(20), ("a", "b"))
    few = data.sample(5)
    assert few.images.flatten().tolist() == few.labels.tolist() == data.sample(5).labels.tolist()
    assert len(set(few.labels.tolist())) == 5 and data.sample(50) is data
    assert few.digest() != data.digest()
