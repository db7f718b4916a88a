"""What denoisers are worth by themselves, on the shipped network and on images whose figures are known."""

import numpy as np
import pytest
import torch
from PIL import Image

from dng_core.models.datasets import DIGITS, Dataset
from dng_core.models.networks import UNet, UNetConfig
from dng_core.models.weight_files import (
    ClassifierInfo,
    DenoiserInfo,
    load_classifier,
    save_classifier,
    save_denoiser,
    shipped_classifiers,
    shipped_denoisers,
)
from dng_core.schedules import DDPMSchedule
from dng_core.studies import network_figures
from dng_core.studies.network_figures import (
    NOISE_LEVELS,
    SHOWN,
    ZOOM,
    errors,
    judged,
    labelled_images,
    networks_figure,
)


def test_a_row_says_what_a_network_draws(tmp_path):
    row = next(networks_figure(["mnist"], None, images=16, steps=3, seed=0))
    assert (row["denoiser"], row["images"], row["distance"]) == ("mnist", 16, None)
    assert 0 <= row["rarest, %"] <= 10 <= row["commonest, %"] <= 100
    assert 0 <= row["unclear, %"] <= 100 and 0 <= row["as asked, %"] <= 100 and row["seconds"] > 0
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(shipped_denoisers()["mnist"].read_bytes())
    again = next(networks_figure([str(copy)], None, images=16, steps=3, seed=0))
    assert {**again, "seconds": 0, "denoiser": ""} == {**row, "seconds": 0, "denoiser": ""}


def test_with_data_there_are_a_distance_and_errors(mnist_like):
    row = next(networks_figure(["mnist"], mnist_like, images=16, steps=2, seed=0))
    assert row["distance"] > 0
    assert [key for key in row if key.startswith("error at ")] == [f"error at {sigma:g}" for sigma in NOISE_LEVELS]


def test_images_drawn_with_labels_are_of_their_own_label_each(monkeypatch):
    """A network that knows nothing but the label draws it as a shade, whatever batches the images come in."""
    monkeypatch.setattr(network_figures, "BATCH", 3)

    def shade(network: UNet, chain: DDPMSchedule, x: torch.Tensor, sigma: float, label: torch.Tensor) -> torch.Tensor:
        return (label.float() / 10)[:, None, None, None].expand_as(x)

    monkeypatch.setattr(network_figures, "denoised", shade)
    network, labels = UNet(UNetConfig(8, 1, 32, (1,), 1, (), num_classes=10)), torch.arange(8)
    images = labelled_images(network, DDPMSchedule.named("linear"), labels, steps=2, seed=0)
    assert torch.equal(images[:, 0, 0, 0], ((labels / 10 + 1) * 127.5).round().to(torch.uint8))


def test_the_sheet_shows_unguided_images_and_every_class(tmp_path):
    next(networks_figure(["mnist"], None, images=16, steps=2, seed=0, sheets=tmp_path))
    with Image.open(tmp_path / "networks-mnist.png") as picture:
        assert picture.size == (SHOWN * ZOOM * 28, (1 + 10) * ZOOM * 28)
        grey = torch.from_numpy(np.asarray(picture))[..., 0].float()
    assert all(float(row.std()) > 10 for row in grey[:, : ZOOM * 28].unflatten(0, (11, -1)))


def test_another_set_of_classes_is_refused(tmp_path):
    described = ClassifierInfo("birds", 28, 1, 4, (-1.0, 1.0), ("crow", "wren"))
    save_classifier(tmp_path / "birds.safetensors", described.network().state_dict(), described)
    with pytest.raises(ValueError, match=r"denoiser mnist \(0, 1.*not those of the classifier birds \(crow, wren\)"):
        next(networks_figure(["mnist"], None, 4, 2, 0, judge=str(tmp_path / "birds.safetensors")))


def test_a_denoiser_without_labels_is_refused(tmp_path):
    network = UNetConfig(28, 1, 32, channel_multipliers=(1,), blocks_per_level=1, attention_levels=(), patch_size=2)
    described = DenoiserInfo("plain", network, "linear", (-1.0, 1.0), ())
    save_denoiser(tmp_path / "plain.safetensors", UNet(network).state_dict(), described)
    with pytest.raises(ValueError, match=r"plain\.safetensors \(none\) are not those of the classifier mnist"):
        next(networks_figure([str(tmp_path / "plain.safetensors")], None, 4, 2, 0))


def test_noise_is_unclear():
    classifier, _ = load_classifier(shipped_classifiers()["mnist"])
    images = torch.randint(0, 256, (8, 1, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    features, classes, unclear = judged(classifier, images)
    assert features.shape[0] == classes.shape[0] == 8
    certain = classifier.head(features).softmax(dim=1).amax(dim=1)
    assert torch.equal(unclear, certain < 0.6)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_error_of_a_perfect_network_is_0(monkeypatch, prediction):
    """The network here knows the images. It is given the labels of half of them."""
    pixels = torch.randint(0, 256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    clean = pixels.float() / 127.5 - 1
    seen: list[list[int]] = []

    def perfect(self: UNet, x: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        seen.append(label.tolist())
        alpha_bar = chain.alpha_bars[timestep[0]].float()
        alpha, spread = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        epsilon = (x - alpha * clean) / spread
        return epsilon if prediction == "epsilon" else alpha * epsilon - spread * clean

    chain = DDPMSchedule.named("linear")
    monkeypatch.setattr(UNet, "forward", perfect)
    network = UNet(UNetConfig(8, 1, 32, (1,), 1, (), num_classes=10, prediction=prediction))
    figures = errors(network, chain, Dataset("try", pixels, torch.tensor([3, 1, 4, 1]), DIGITS), seed=0)
    assert all(error < 1 for error in figures.values())
    assert seen[0] == [3, 10, 4, 10]
