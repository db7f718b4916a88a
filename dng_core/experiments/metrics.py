"""Measures of class removal: safety, balance of the other classes, and what happened to the images left alone.

Counts are histograms over the K classes of what a classifier saw; ``forbidden`` is the removed class. With N images,
n_c of them in class c, and u = 1 / (K - 1) the uniform distribution over the other classes:

    forbidden share     n_f / N
    KL, the paper's     sum_{c != f} u log(u / q_c),  q_c = max(n_c, 1) / N
    KL, renormalised    the same with q_c = max(n_c, 1) / (N - n_f)

Both are KL(uniform || generated), in nats: 0 when the other classes are drawn equally often, and large when one of
them is missing. The paper's is not renormalised: where no class is empty it is the renormalised one minus
log(1 - forbidden share). A class that nobody drew counts as one image, as in the paper.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def class_histogram(classes: Tensor, num_classes: int) -> tuple[int, ...]:
    """How many of ``classes``, (n,) long, fall in each of ``num_classes`` classes."""
    return tuple(torch.bincount(classes.cpu(), minlength=num_classes).tolist())


def forbidden_share(histogram: Sequence[int], forbidden: int) -> float:
    """The share of images that still show the forbidden class."""
    return histogram[forbidden] / _total(histogram)


def wilson_interval(count: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927); the default z gives 95 %."""
    share = count / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    radius = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return max(0.0, centre - radius), min(1.0, centre + radius)


def balance_kl(histogram: Sequence[int], forbidden: int) -> float:
    """KL(uniform over the other classes || generated), in nats, in the paper's form (see the module's top)."""
    return _kl(histogram, forbidden, _total(histogram))


def balance_kl_renormalised(histogram: Sequence[int], forbidden: int) -> float:
    """KL(uniform || generated) among the images of the other classes, in nats; NaN where there is none of them."""
    return _kl(histogram, forbidden, _total(histogram) - histogram[forbidden])


@dataclass(frozen=True)
class Change:
    """What guidance did to the images whose baseline, from the same seed, was not of the forbidden class.

    ``images``: how many those are; ``kept``: the share of them that keep their class; ``rms``: the root mean square
    over all their pixels of guided minus baseline, in the unit of the images. The last two are NaN where ``images``
    is 0.
    """

    images: int
    kept: float
    rms: float


def change_from_baseline(
    images: Tensor, classes: Tensor, baseline: Tensor, baseline_classes: Tensor, forbidden: int
) -> Change:
    """Compare images with those drawn without guidance from the same seeds, one by one.

    Parameters
    ----------
    images, baseline: (n, channels, height, width), in the same unit.
    classes, baseline_classes: (n,) long, what the classifier saw in them.

    Raises
    ------
    ValueError: if the two batches differ in shape.
    """
    if images.shape != baseline.shape:
        raise ValueError(
            f"images and baseline must have one shape to be compared seed by seed, "
            f"not {tuple(images.shape)} and {tuple(baseline.shape)}"
        )
    spared = baseline_classes != forbidden
    count = int(spared.sum())
    if count == 0:
        return Change(0, math.nan, math.nan)
    kept = (classes == baseline_classes)[spared].double().mean()
    rms = (images - baseline)[spared].double().square().mean().sqrt()
    return Change(count, float(kept), float(rms))


def _total(histogram: Sequence[int]) -> int:
    total = sum(histogram)
    if total == 0:
        raise ValueError("there are no images to measure")
    return total


def _kl(histogram: Sequence[int], forbidden: int, total: int) -> float:
    if total == 0:
        return math.nan
    others = [n for c, n in enumerate(histogram) if c != forbidden]
    uniform = 1 / len(others)
    return sum(uniform * math.log(uniform / (max(n, 1) / total)) for n in others)
