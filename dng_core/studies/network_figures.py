"""How good denoisers are by themselves: what they draw without guidance, and how well they denoise unseen images."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..models.checkpoints import open_denoiser
from ..models.datasets import Dataset, load_dataset
from ..models.mnist import to_model_range
from ..models.networks import Classifier, UNet
from ..models.predictors import LabelConditional, denoised
from ..models.weight_files import open_classifier
from ..sampling import Predictor, ddpm_sample
from ..schedules import DDPMSchedule, ddpm_sigmas
from .class_removal import chain_name, image_shape, starting_noise
from .features import Gaussian, classified, frechet_distance
from .measuring import check_data, check_denoiser
from .metrics import class_histogram

BATCH = 125  # images drawn at once; like the numbers below, a choice
UNCLEAR = 0.6  # an image is unclear if the classifier gives every class a lower probability
LABELLED = 500  # at most so many images are drawn with labels, each class in turn
SHOWN, ZOOM = 12, 2  # images of a class in the sheet, and how many times as large
REAL_IMAGES = 10_000  # of the training split, for the Fréchet distance
HELD_OUT = 256  # images of the test split that are denoised
NOISE_LEVELS = (0.3, 1.0, 2.5, 6.0, 20.0)  # sigma


@torch.no_grad()
def networks_figure(
    sources: Sequence[str],
    data: Path | None,
    images: int,
    steps: int,
    seed: int,
    judge: str = "mnist",
    dataset: str = "mnist",
    sheets: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """One row per label-conditional denoiser, drawing unguided; ``sources`` are what ``open_denoiser`` reads.

    *unclear*: percent of images in which the classifier gives every class a probability below 0.6. *rarest* and
    *commonest*: percent of images in these two classes. *distance*: Fréchet distance to training images, in the
    classifier's features. *as asked*: percent of up to 500 images, drawn with labels, in which the classifier sees the
    label. *seconds*: time for 100 unguided images. *error at* a sigma: 1000 times the mean squared error of denoised
    test images, half of them with their label. Distance and errors need ``data``.

    Parameters
    ----------
    data, dataset: the folder and the name of the images that the denoisers were trained on.
    judge: a shipped classifier's name, or its file.
    sheets: a folder for a picture of each denoiser: a row of unguided images, and a row of each class.

    Raises
    ------
    ValueError: for a denoiser, a classifier and data that do not know the same classes.
    """
    classifier, seen = open_classifier(judge)
    real = load_dataset(dataset, data, train=True).sample(REAL_IMAGES) if data else None
    held_out = load_dataset(dataset, data, train=False).sample(HELD_OUT) if data else None
    if real:
        check_data(real, seen)
    gaussian = Gaussian.of(classified(classifier, real.images.numpy())[0]) if real else None
    for source in sources:
        network, info = open_denoiser(source)
        check_denoiser(source, network, info.class_names, seen)
        chain, classes = DDPMSchedule.named(chain_name(info)), len(info.class_names)
        drawn, seconds = unguided(network, chain, images, steps, seed)
        asked = torch.arange(min(LABELLED, images)) % classes
        labelled = labelled_images(network, chain, asked, steps, seed)
        features, found, unclear = judged(classifier, drawn)
        shares = [count / images for count in class_histogram(found, classes)]
        row = {
            "denoiser": source,
            "predicts": network.config.prediction,
            "images": images,
            "unclear, %": 100 * float(unclear.double().mean()),
            "rarest, %": 100 * min(shares),
            "commonest, %": 100 * max(shares),
            "distance": frechet_distance(Gaussian.of(features), gaussian) if gaussian else None,
            "as asked, %": 100 * float((judged(classifier, labelled)[1] == asked).double().mean()),
            "seconds": 100 * seconds / images,
        }
        if sheets is not None:
            rows = [drawn, *(labelled[asked == label] for label in range(classes))]
            sheet(rows).save(sheets / f"networks-{Path(source).stem}.png")
        yield row | (errors(network, chain, held_out, seed) if held_out else {})


def sheet(rows: Sequence[Tensor]) -> Image.Image:
    """A picture of the first images of each row, (n, channels, height, width) uint8."""
    height, width = (ZOOM * side for side in rows[0].shape[2:])
    picture = Image.new("RGB", (SHOWN * width, len(rows) * height))
    for i, row in enumerate(rows):
        for j, image in enumerate(row[:SHOWN]):
            pixels = image.expand(3, *image.shape[1:]).permute(1, 2, 0).numpy()
            picture.paste(
                Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (j * width, i * height)
            )
    return picture


def unguided(network: UNet, chain: DDPMSchedule, images: int, steps: int, seed: int) -> tuple[Tensor, float]:
    """Images, (n, channels, height, width) uint8, of DDPM steps without a label, and the seconds that they took.

    FloatingPointError if an image is not finite.
    """
    predict = LabelConditional(network, chain, None)
    return _drawn(network, chain, lambda start, size: predict, images, steps, seed)


def labelled_images(network: UNet, chain: DDPMSchedule, labels: Tensor, steps: int, seed: int) -> Tensor:
    """Images, as :func:`unguided` draws them, of these labels, (n,)."""

    def labelled(start: int, size: int) -> Predictor:
        return lambda x, sigma: (denoised(network, chain, x, sigma, labels[start : start + size].to(x.device)), [])

    return _drawn(network, chain, labelled, len(labels), steps, seed)[0]


@torch.no_grad()
def _drawn(
    network: UNet,
    chain: DDPMSchedule,
    predictor: Callable[[int, int], Predictor],
    images: int,
    steps: int,
    seed: int,
) -> tuple[Tensor, float]:
    levels, parts, began = ddpm_sigmas(chain, steps), [], time.monotonic()
    for start in range(0, images, BATCH):
        size = min(BATCH, images - start)
        noise, generator = starting_noise(start, size, seed, image_shape(network))
        noise = noise.to(network.conv_in.weight.device)
        parts.append(ddpm_sample(predictor(start, size), noise, levels, generator=generator).cpu())
    seconds = time.monotonic() - began
    if not bool(torch.cat(parts).isfinite().all()):
        raise FloatingPointError("the denoiser draws images that are not finite: check its weights")
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), seconds


def judged(classifier: Classifier, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of uint8 ``images``: the classifier's features, (n, d), the classes, (n,), and whether they are unclear."""
    features, classes = classified(classifier, images.numpy())
    return features, classes, classifier.head(features).softmax(dim=1).amax(dim=1) < UNCLEAR


def errors(network: UNet, chain: DDPMSchedule, data: Dataset, seed: int) -> dict[str, float]:
    """1000 times the mean squared error of the denoised images at each of the noise levels, on a range of -1 to 1."""
    clean, generator = to_model_range(data.images), torch.Generator().manual_seed(seed)
    labels = torch.where(torch.arange(len(clean)) % 2 == 0, data.labels, network.config.num_classes)
    columns = {}
    for sigma in NOISE_LEVELS:
        noisy = clean + sigma * torch.randn(clean.shape, generator=generator)
        difference = denoised(network, chain, noisy, sigma, labels) - clean
        columns[f"error at {sigma:g}"] = 1000 * float(difference.square().mean())
    return columns
