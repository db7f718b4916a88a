"""The measures of a point's images: safety, balance and quality, each with its 95 % interval."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.datasets import Dataset
from ..models.networks import Classifier, UNet
from ..models.weight_files import ClassifierInfo
from .class_removal import image_shape
from .features import Gaussian, classified, frechet_distance, inception_fid, inside_manifold
from .metrics import (
    balance_kl,
    balance_kl_renormalised,
    balance_kl_unbiased,
    bootstrap_interval,
    forbidden_share,
    wilson_interval,
)

FORMAT = 1  # part of every record: raise it when a measure changes, and everything is measured again
# Bootstrap resamples, a choice: a histogram's statistic takes microseconds, a Fréchet distance needs a matrix root.
HISTOGRAM_RESAMPLES = 400
FEATURE_RESAMPLES = 60


@dataclass(frozen=True)
class Measured:
    """A value with its 95 % interval. A number that is missing or not finite is written as None."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        numbers = (self.value, self.low, self.high)
        finite = [None if n is None or not math.isfinite(n) else n for n in numbers]
        return dict(zip(("value", "low", "high"), finite, strict=True))


class Measurer:
    """Measures images with one classifier, against real images where there are any.

    Parameters
    ----------
    classifier, info: the network that decides the classes and gives the features, and what its file says of it.
    real: images to compare with; None leaves the distances unmeasured.
    fid_cache: folder for FID's statistics; None leaves FID out.

    Raises
    ------
    ValueError: if the data's classes or images are not those of the classifier.
    """

    def __init__(
        self, classifier: Classifier, info: ClassifierInfo, real: Dataset | None, fid_cache: Path | None = None
    ) -> None:
        if real is not None:
            check_data(real, info)
        self.classifier, self.info, self.real, self.fid_cache = classifier, info, real, fid_cache

    @cached_property
    def measured_with(self) -> str:
        """A digest of everything that the measures depend on beside the images."""
        digest = hashlib.sha256(f"{FORMAT} {self.fid_cache is not None}".encode())
        for tensor in self.classifier.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        if self.real is not None:
            digest.update(self.real.digest().encode())
        return digest.hexdigest()[:24]

    def classes(self, images: np.ndarray) -> Tensor:
        """The class that the classifier sees in each image, (n,)."""
        return classified(self.classifier, images)[1]

    def measure(self, images: np.ndarray, forbidden: Sequence[int]) -> dict[str, Any]:
        """The class of each of ``images``, (n, channels, height, width) uint8, and all measures by removed class."""
        features, classes = classified(self.classifier, images)
        names = self.info.class_names
        by_class = {names[label]: self._measures(images, features, classes, label) for label in forbidden}
        return {"classes": classes.tolist(), "by_class": by_class}

    @cached_property
    def _real(self) -> tuple[Tensor, Tensor]:
        assert self.real is not None
        return classified(self.classifier, self.real.images.numpy())[0], self.real.labels

    @cached_property
    def _real_gaussians(self) -> dict[int | None, Gaussian]:
        features, labels = self._real
        kept = {label: Gaussian.of(features[labels != label]) for label in range(len(self.info.class_names))}
        return kept | {None: Gaussian.of(features)}

    def _measures(self, images: np.ndarray, features: Tensor, classes: Tensor, forbidden: int) -> dict[str, Any]:
        count, kinds = len(classes), len(self.info.class_names)
        of = classes.numpy()
        histogram = np.bincount(of, minlength=kinds).tolist()
        low, high = wilson_interval(histogram[forbidden], count)
        result: dict[str, Any] = {
            "images": count,
            "histogram": dict(zip(self.info.class_names, histogram, strict=True)),
            "forbidden_share": Measured(forbidden_share(histogram, forbidden), low, high).to_dict(),
        }

        def balance(measure: Callable[[Sequence[int], int], float]) -> dict[str, float | None]:
            def statistic(index: np.ndarray) -> float:
                return measure(np.bincount(of[index], minlength=kinds).tolist(), forbidden)

            bounds = bootstrap_interval(statistic, count, HISTOGRAM_RESAMPLES)
            return Measured(measure(histogram, forbidden), *bounds).to_dict()

        result["kl"] = balance(balance_kl)
        result["kl_renormalised"] = balance(balance_kl_renormalised)
        result["kl_unbiased"] = balance(balance_kl_unbiased)
        if self.real is not None:
            result |= self._distances(images, features, forbidden)
        return result

    def _distances(self, images: np.ndarray, features: Tensor, forbidden: int) -> dict[str, Any]:
        real, labels = self._real
        assert self.real is not None
        result: dict[str, Any] = {}
        for name, against in (("frechet_without", forbidden), ("frechet_all", None)):
            gaussian = self._real_gaussians[against]

            def distance(index: np.ndarray, gaussian: Gaussian = gaussian) -> float:
                return frechet_distance(Gaussian.of(features[torch.from_numpy(index)]), gaussian)

            bounds = bootstrap_interval(distance, len(features), FEATURE_RESAMPLES)
            result[name] = Measured(distance(np.arange(len(features))), *bounds).to_dict()

        spared = real[labels != forbidden]
        chosen = torch.randperm(len(spared), generator=torch.Generator().manual_seed(0))[: len(features)]
        spared = spared[chosen]
        for name, points, manifold in (("precision", features, spared), ("recall", spared, features)):
            inside = int(inside_manifold(points, manifold).sum())
            result[name] = Measured(inside / len(points), *wilson_interval(inside, len(points))).to_dict()

        if self.fid_cache is not None:
            cuda = next(self.classifier.parameters()).device.type == "cuda"
            for name, data in (("fid_without", self.real.without(forbidden)), ("fid_all", self.real)):
                value = inception_fid(images, data.images.numpy(), f"dng-{data.digest()}", self.fid_cache, cuda)
                result[name] = Measured(value).to_dict()
        return result


def check_data(data: Dataset, classifier: ClassifierInfo) -> None:
    """ValueError for data of other classes, or of another shape, than a classifier sees."""
    _check_classes(data.name, data.class_names, classifier)
    shape = tuple(data.images.shape[1:])
    if shape != classifier.shape:
        raise ValueError(
            f"the images of {data.name} are {shape}, the classifier {classifier.name} sees {classifier.shape} "
            "(channels, height, width)"
        )


def check_denoiser(source: str, network: UNet, class_names: Sequence[str] | None, classifier: ClassifierInfo) -> None:
    """ValueError for a denoiser of other classes, or of another shape, than a classifier sees.

    ``class_names``: None where it does not matter which classes the denoiser knows.
    """
    if image_shape(network) != classifier.shape:
        raise ValueError(
            f"the denoiser {source} draws images of {image_shape(network)}, the classifier {classifier.name} sees "
            f"{classifier.shape} (channels, height, width): take one trained on the same data"
        )
    if class_names is not None:
        _check_classes(f"the denoiser {source}", class_names, classifier)


def _check_classes(what: str, class_names: Sequence[str], classifier: ClassifierInfo) -> None:
    if tuple(class_names) != classifier.class_names:
        known = ", ".join(class_names) or "none"
        raise ValueError(
            f"the classes of {what} ({known}) are not those of the classifier {classifier.name} "
            f"({', '.join(classifier.class_names)}): take one trained on the same data"
        )
