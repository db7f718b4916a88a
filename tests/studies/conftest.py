"""A tiny experiment's files, a small picture book, and networks in the layouts of others."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dng_core.models.networks import SmallClassifier
from dng_core.models.picture_book.networks import CrossUNetConfig, PictureBook
from dng_core.models.picture_book.training import TEXT
from dng_core.models.picture_book.weights import PictureBookInfo, save_picture_book
from dng_core.models.weight_files import ClassifierInfo, save_classifier
from dng_core.studies import class_removal

from ..models.layouts import class_only_state, public_unet  # noqa: F401
from .small_experiment import NAMES, experiment, random_denoiser


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals are tested elsewhere."""
    monkeypatch.setattr("dng_core.studies.measuring.HISTOGRAM_RESAMPLES", 10)
    monkeypatch.setattr("dng_core.studies.measuring.FEATURE_RESAMPLES", 3)
    class_removal.network.cache_clear()


@pytest.fixture
def quick_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bootstrap of distances takes most of the time of so small a study of the picture book."""
    monkeypatch.setattr("dng_core.studies.picture_book.measures.FEATURE_RESAMPLES", 9)


@pytest.fixture
def files(tmp_path: Path, few_resamples: None) -> Path:
    """A folder with a random denoiser, a random classifier, an experiment on them, and JPEG images to compare with."""
    random_denoiser(tmp_path / "denoiser.safetensors")
    torch.manual_seed(1)
    info = ClassifierInfo("try", 8, 1, 4, (-1.0, 1.0), NAMES)
    save_classifier(tmp_path / "classifier.safetensors", SmallClassifier(1, 3, 4).state_dict(), info)
    generator = np.random.default_rng(0)
    for name in NAMES:
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            grey = Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8))
            grey.save(tmp_path / "data" / name / f"{i}.jpg")
    experiment(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small picture book's, all random, for many layers begin at 0, and then no text would matter."""
    torch.manual_seed(0)
    small = CrossUNetConfig(
        model_channels=32, channel_mult=(1, 1), num_res_blocks=(0, 0), transformer_depth=(),
        transformer_depth_output=(0, 0),
    )  # fmt: skip
    model = PictureBook(TEXT, small)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
    path = tmp_path_factory.mktemp("book") / "book.safetensors"
    save_picture_book(path, model.state_dict(), PictureBookInfo(TEXT, small))
    return path
