"""How well the posterior of a trained network knows the class of the network's own unguided images.

Suppose that both predictions belong to one distribution. In the images that become a class, the evidence for the class
then grows to log(1 / share) nats, its maximum. An error that the two do not share lowers the evidence in every image.
The same images show which rule for the posterior's increments foretells the class best.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..calibration import evidence_of
from ..guidance import NegativeGuidance
from ..models.networks import Classifier, UNet
from ..models.predictors import EveryLabel, LabelConditional
from ..models.weight_files import load_denoiser, open_classifier, shipped_denoisers
from ..posterior import Chain
from ..sampling import Predictor, ddpm_sample
from ..schedules import DDPMSchedule, ddpm_sigmas
from ..settings import Rule, Settings
from .class_removal import chain_name, image_shape, starting_noise
from .features import decided

BATCH = 128  # images drawn at once: a choice
BOUNDS = (math.inf, 3.0, 0.3, 0.0)  # of sigma, a choice: an image's class is open, then decided, then settled


@torch.no_grad()
def evidence_figure(images: int, steps: int, seed: int) -> Iterator[dict[str, Any]]:
    """One row per digit of the shipped MNIST network: mean evidence, in nats, of the unguided images of that digit."""
    network, classifier, chain, names = shipped_mnist()
    levels = ddpm_sigmas(chain, steps)
    for digit, name in enumerate(names):
        predict = LabelConditional(network, chain, digit)
        shown, increments = [], []
        for start in range(0, images, BATCH):
            noise, generator = starting_noise(start, min(BATCH, images - start), seed, image_shape(network))
            observer = NegativeGuidance([Settings(guidance_scale=0.0)], Chain(levels))
            drawn = ddpm_sample(predict, noise, levels, observer, generator)
            shown.append(decided(classifier(drawn)) == digit)
            increments.append(evidence_of(observer)[0].increments)
        yield {"class": name, "images": images} | summed(torch.cat(increments, dim=1), torch.cat(shown), levels)


@torch.no_grad()
def rules_figure(images: int, steps: int, seed: int) -> Iterator[dict[str, Any]]:
    """One row per rule: how well the posteriors of all ten digits foretell the classes of unguided images.

    The scores are the *cross entropy*, in nats, and the *area under the ROC curve*, each a mean over the digits. Both
    are taken at the middle and at the end of the run; the cross entropy is also averaged over all steps.
    """
    network, classifier, chain, names = shipped_mnist()
    levels = ddpm_sigmas(chain, steps)
    null = network.config.num_classes
    concept = Settings(prior=1 / null - 1e-3, guidance_scale=0.0)
    rules: tuple[Rule, ...] = ("algorithm_2", "step_noise")
    posteriors: dict[Rule, list[Tensor]] = {rule: [] for rule in rules}
    shown, predict = [], EveryLabel(network, chain)

    for start in range(0, images, BATCH):
        noise, generator = starting_noise(start, min(BATCH, images - start), seed, image_shape(network))
        observers = [
            NegativeGuidance(
                [concept.with_(rule=rule)] * len(names), Chain(levels, noise_fraction=lambda *levels: 1.0)
            )
            for rule in rules
        ]
        drawn = ddpm_sample(partial(_seen_by, predict, observers), noise, levels, generator=generator)
        shown.append(decided(classifier(drawn)))
        for rule, guidance in zip(rules, observers, strict=True):
            posteriors[rule].append(guidance.trace().posterior)
    truth = torch.cat(shown) == torch.arange(len(names))[:, None]
    for rule, tracked in posteriors.items():
        yield {"rule": rule, "images": images, "steps": steps} | foretold(torch.cat(tracked, dim=2), truth)


def _seen_by(
    predict: Predictor, observers: Sequence[NegativeGuidance], x: Tensor, sigma: float
) -> tuple[Tensor, list[Tensor]]:
    """Show all predictions to every tracker, and return the reference alone, so that the images stay unguided."""
    reference, undesired = predict(x, sigma)
    for guidance in observers:
        guidance(x, sigma, reference, reference, undesired)
    return reference, []


def foretold(posterior: Tensor, truth: Tensor) -> dict[str, float]:
    """Scores of ``posterior``, (steps, classes, n), against ``truth``, (classes, n) bool; see :func:`rules_figure`."""
    entropy = -torch.where(truth, posterior.log(), torch.log1p(-posterior)).mean(dim=(1, 2))
    middle, end = len(posterior) // 2, len(posterior) - 1
    return {
        "cross entropy, mean": float(entropy.mean()),
        "middle": float(entropy[middle]),
        "end": float(entropy[end]),
        "ROC area, middle": roc_area(posterior[middle], truth),
        "ROC area, end": roc_area(posterior[end], truth),
    }


def roc_area(posterior: Tensor, truth: Tensor) -> float:
    """How often an image of a class has a larger posterior than others; ties count half; mean over the classes."""
    areas = []
    for given, of_class in zip(posterior, truth, strict=True):
        difference = given[of_class][:, None] - given[~of_class]
        areas.append(((difference > 0).float() + (difference == 0).float() / 2).mean())
    return float(torch.stack(areas).nanmean())


def shipped_mnist() -> tuple[UNet, Classifier, DDPMSchedule, Sequence[str]]:
    """The shipped denoiser, its classifier, its chain and the names of its classes."""
    network, info = load_denoiser(shipped_denoisers()["mnist"])
    classifier, _ = open_classifier("mnist")
    return network, classifier, DDPMSchedule.named(chain_name(info)), info.class_names


def summed(increments: Tensor, shown: Tensor, levels: list[float]) -> dict[str, Any]:
    """Mean evidence of the images that are ``shown`` to be of the class, by range of the noise level.

    ``increments``: (jumps, n), from each level to the next; ``shown``: (n,) bool; ``levels``: falling, jumps + 1.
    """
    count = int(shown.sum())
    starts = torch.tensor(levels[: len(increments)])
    evidence = increments[:, shown].mean(dim=1) if count else torch.full((len(increments),), math.nan)
    columns = {
        f"sigma above {low:g}" if math.isinf(high) else f"{low:g} to {high:g}": float(
            evidence[(starts >= low) & (starts < high)].sum()
        )
        for high, low in pairwise(BOUNDS)
    }
    best = math.log(len(shown) / count) if count else None
    return {"of the class": count, "most there is": best} | columns | {"in all": float(evidence.sum())}
