"""Distances between drawn and real images in a classifier's features, and FID where Inception-V3's weights can be had.

The Fréchet distance in the shipped classifier's features is FID's formula with another network. It is never called
FID, because its values cannot be compared with FID's.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.mnist import to_model_range
from ..models.networks import Classifier

NEIGHBOURS = 3  # Kynkäänniemi et al. (2019) use k = 3


@dataclass(frozen=True)
class Gaussian:
    """Mean, (d,), and covariance, (d, d), of features, in float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Gaussian":
        """The Gaussian with the moments of ``features``, (n, d); ValueError for less than two images."""
        if len(features) < 2:
            raise ValueError(f"a Fréchet distance needs at least 2 images on each side, not {len(features)}")
        return cls(features.double().mean(dim=0), torch.cov(features.double().T, correction=1))

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Dowson & Landau 1982; Heusel et al. 2017).

    (C_a C_b)^(1/2) has the same trace as the symmetric (C_b^(1/2) C_a C_b^(1/2))^(1/2), which is computed from
    eigenvalues. Pass the real images as ``b``: its root is cached.
    """
    cross = torch.linalg.eigvalsh(b.root @ a.covariance @ b.root).clamp(min=0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces - 2 * cross)


def inside_manifold(points: Tensor, manifold: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Whether each of ``points`` lies in the manifold of other points (Kynkäänniemi et al. 2019, eq. 2); (n,) bool.

    A point lies inside if it is as near to some manifold point as that point's ``neighbours``-th nearest neighbour.
    Precision is the share of drawn features inside the manifold of the real ones; recall is the reverse.
    """
    if len(manifold) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} images on each side, not {len(manifold)}")
    radii = torch.cdist(manifold, manifold).kthvalue(neighbours + 1, dim=1).values  # the nearest is the point itself
    return torch.cat([(torch.cdist(part, manifold) <= radii).any(dim=1) for part in points.split(1000)])


@torch.no_grad()
def classified(classifier: Classifier, images: np.ndarray, batch: int = 500) -> tuple[Tensor, Tensor]:
    """What a classifier sees in uint8 images, (n, channels, height, width): features (n, d) and classes (n,).

    ValueError as :func:`decided`.
    """
    device = next(classifier.parameters()).device
    features = []
    for part in torch.from_numpy(images).split(batch):
        features.append(classifier.features(to_model_range(part).to(device)).cpu())
    everything = torch.cat(features)
    return everything, decided(classifier.head(everything.to(device))).cpu()


def decided(logits: Tensor) -> Tensor:
    """The class of each image, (n,), by a classifier's logits, (n, classes).

    ValueError where some are not finite: the image or the classifier's weights are not, and it would count as whatever
    class the comparison of NaNs happens to give.
    """
    if not bool(logits.isfinite().all()):
        raise ValueError("the classifier sees images that are not finite, or its weights are not: check both")
    return logits.argmax(dim=1)


def require_inception() -> None:
    """Fetch what FID needs, or find it there; ValueError if torch-fidelity or Inception-V3's weights cannot be had."""
    try:
        from torch_fidelity.utils import create_feature_extractor
    except ModuleNotFoundError as error:
        raise ValueError("FID needs torch-fidelity: pip install torch-fidelity, or leave out --fid") from error
    try:
        create_feature_extractor("inception-v3-compat", ["2048"], cuda=False, verbose=False)
    except OSError as error:  # urllib's errors: no connection to the weights
        raise ValueError(
            f"FID needs Inception-V3's weights, which torch-fidelity could not fetch ({error}): try again where there "
            f"is internet, or leave out --fid (the Fréchet distance in the classifier's features needs none)"
        ) from error


def inception_fid(images: np.ndarray, reference: np.ndarray, name: str, cache: Path, cuda: bool) -> float:
    """FID with Inception-V3, by torch-fidelity, after :func:`require_inception`.

    Parameters
    ----------
    images, reference: drawn and real ones, (n, channels, height, width) uint8.
    name: under which the reference's statistics are kept in ``cache``.
    """
    import torch_fidelity

    figures: dict[str, Any] = torch_fidelity.calculate_metrics(
        input1=_Images(images),
        input2=_Images(reference),
        input2_cache_name=name,
        cache_root=str(cache),
        cuda=cuda,
        fid=True,
        verbose=False,
    )
    return float(figures["frechet_inception_distance"])


class _Images(torch.utils.data.Dataset[Tensor]):
    """uint8 images with three channels, as torch-fidelity wants them."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = torch.from_numpy(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index].expand(3, -1, -1)
