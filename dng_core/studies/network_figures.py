"""How good denoisers are by themselves: what they draw without guidance, and how well they denoise unseen images."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.checkpoints import open_denoiser
from ..models.datasets import Dataset, load_dataset
from ..models.mnist import to_model_range
from ..models.networks import Classifier, UNet
from ..models.predictors import LabelConditional, denoised
from ..models.weight_files import load_classifier, shipped_classifiers
from ..sampling import ddpm_sample
from ..schedules import DDPMSchedule, ddpm_sigmas
from .class_removal import chain_name, image_shape, starting_noise
from .features import Gaussian, classified, frechet_distance
from .metrics import class_histogram

BATCH = 125  # images drawn at once; like the numbers below, a choice
UNCLEAR = 0.6  # an image is unclear if the classifier gives every class a lower probability
REAL_IMAGES = 10_000  # of the training split, for the Fréchet distance
HELD_OUT = 256  # images of the test split that are denoised
NOISE_LEVELS = (0.3, 1.0, 2.5, 6.0, 20.0)  # sigma


@torch.no_grad()
def networks_figure(
    sources: Sequence[str], data: Path | None, images: int, steps: int, seed: int
) -> Iterator[dict[str, Any]]:
    """One row per label-conditional MNIST denoiser, drawing unguided; ``sources`` are what ``open_denoiser`` reads.

    *unclear*: percent of images in which the classifier gives every class a probability below 0.6. *rarest* and
    *commonest*: percent of images in these two classes. *distance*: Fréchet distance to training images, in the
    classifier's features. *seconds*: time for 100 images. *error at* a sigma: 1000 times the mean squared error of
    denoised test images, half of them with their label. Distance and errors need ``data``, MNIST's folder.
    """
    classifier, _ = load_classifier(shipped_classifiers()["mnist"])
    real = load_dataset("mnist", data, train=True).sample(REAL_IMAGES) if data else None
    held_out = load_dataset("mnist", data, train=False).sample(HELD_OUT) if data else None
    gaussian = Gaussian.of(classified(classifier, real.images.numpy())[0]) if real else None
    for source in sources:
        network, info = open_denoiser(source)
        chain = DDPMSchedule.named(chain_name(info))
        drawn, seconds = unguided(network, chain, images, steps, seed)
        features, classes, unclear = judged(classifier, drawn)
        shares = [count / images for count in class_histogram(classes, len(info.class_names))]
        row = {
            "denoiser": source,
            "predicts": network.config.prediction,
            "images": images,
            "unclear, %": 100 * float(unclear.double().mean()),
            "rarest, %": 100 * min(shares),
            "commonest, %": 100 * max(shares),
            "distance": frechet_distance(Gaussian.of(features), gaussian) if gaussian else None,
            "seconds": 100 * seconds / images,
        }
        yield row | (errors(network, chain, held_out, seed) if held_out else {})


def unguided(network: UNet, chain: DDPMSchedule, images: int, steps: int, seed: int) -> tuple[Tensor, float]:
    """Images, (n, channels, height, width) uint8, of DDPM steps without a label, and the seconds that they took.

    FloatingPointError if an image is not finite.
    """
    predict, levels = LabelConditional(network, chain, None), ddpm_sigmas(chain, steps)
    parts, began = [], time.monotonic()
    for start in range(0, images, BATCH):
        noise, generator = starting_noise(start, min(BATCH, images - start), seed, image_shape(network))
        parts.append(ddpm_sample(predict, noise, levels, generator=generator))
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
