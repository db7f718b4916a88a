"""Measures of class removal: safety, the balance of the other classes, and the change of images to be left alone.

Counts are histograms over the K classes of what a classifier saw; ``forbidden`` is the removed class. With N images,
n_c of them in class c, and u = 1 / (K - 1) the uniform distribution over the other classes:

    forbidden share     n_f / N
    KL, the paper's     sum_{c != f} u log(u / q_c),  q_c = max(n_c, 1) / N
    KL, renormalised    the same with q_c = max(n_c, 1) / (N - n_f)

Both are KL(uniform || generated), in nats: 0 when the other classes are drawn equally often, and large when one of
them is missing. The paper's form is the renormalised one minus log(1 - forbidden share). A class without images counts
as one image, as in the paper.

    KL, unbiased        sum_{c != f} u (log u - H(n_c) + H(N - n_f)),  H the harmonic numbers, H(0) = 0

With few images the first two forms are too large, even for a balanced model: by about (K - 2) / (2 (N - n_f)). For a
Poisson count, E[H(n)] = gamma + log E[n] + E_1(E[n]) (Grassberger 2003). The only bias of the third form is therefore
E_1, less than 1e-5 at ten images a class. For a balanced model its values scatter around 0, and some are negative.

Only the intervals import scipy, which every ComfyUI has.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

EULER_GAMMA = 0.5772156649015329


def class_histogram(classes: Tensor, num_classes: int) -> tuple[int, ...]:
    """How many of ``classes``, (n,) long, fall in each of ``num_classes`` classes."""
    return tuple(torch.bincount(classes.cpu(), minlength=num_classes).tolist())


def forbidden_share(histogram: Sequence[int], forbidden: int) -> float:
    """The share of images that still show the forbidden class."""
    return histogram[forbidden] / _total(histogram)


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(count, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def balance_kl(histogram: Sequence[int], forbidden: int) -> float:
    """KL(uniform over the other classes || generated), in nats, in the paper's form (see the module's top)."""
    return _kl(histogram, forbidden, _total(histogram))


def balance_kl_renormalised(histogram: Sequence[int], forbidden: int) -> float:
    """KL(uniform || generated) among the images of the other classes, in nats; NaN where there is none of them."""
    return _kl(histogram, forbidden, _total(histogram) - histogram[forbidden])


def balance_kl_unbiased(histogram: Sequence[int], forbidden: int) -> float:
    """KL(uniform || generated) of the other classes, in nats, without small samples' bias; NaN without images."""
    others = [n for c, n in enumerate(histogram) if c != forbidden]
    total = sum(others)
    if total == 0:
        return math.nan
    return sum((_harmonic(total) - _harmonic(n) - math.log(len(others))) / len(others) for n in others)


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], count: int, resamples: int = 200, seed: int = 0, share: float = 0.95
) -> tuple[float, float]:
    """The basic bootstrap interval (Davison & Hinkley 1997, eq. 5.6) of ``statistic(indices)`` over 2 or more images.

    Its ends are 2 t - q, for the statistic t and quantiles q of resamples with replacement. A resample has fewer
    distinct images, which raises divergences and distances. 2 t - q takes this rise away; q would count it twice.
    """
    from scipy.stats import DegenerateDataWarning, bootstrap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # a statistic that is NaN has NaN for its interval
        interval = bootstrap(
            (np.arange(count),), statistic, vectorized=False, method="basic", confidence_level=share,
            n_resamples=resamples, batch=1, rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Change:
    """What guidance did to the images whose baseline, from the same seed, was not of the forbidden class.

    ``images``: the number of these images. ``kept``: the share of them that keep their class. ``rms``: the root mean
    square of guided minus baseline over all their pixels, in the images' unit. The last two are NaN without images.
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


@cache
def _harmonic(n: int) -> float:
    return float(torch.digamma(torch.tensor(n + 1.0, dtype=torch.float64))) + EULER_GAMMA


def _kl(histogram: Sequence[int], forbidden: int, total: int) -> float:
    if total == 0:
        return math.nan
    others = [n for c, n in enumerate(histogram) if c != forbidden]
    uniform = 1 / len(others)
    return sum(uniform * math.log(uniform / (max(n, 1) / total)) for n in others)
