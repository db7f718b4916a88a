"""The calibration of label-conditional networks, whose classes are alternatives, and how good it is."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..calibration import EXACT, FIT, Calibration, Evidence, calibrate, evidence_of, track
from ..calibration_files import ModelCalibration
from ..guidance import NegativeGuidance
from ..models.checkpoints import open_denoiser
from ..models.networks import UNet
from ..models.predictors import EveryLabel, Precision, in_precision
from ..models.weight_files import open_classifier
from ..posterior import Chain
from ..sampling import Predictor
from ..schedules import DDPMSchedule, ddpm_sigmas
from ..settings import Settings
from ..shares import share_of
from .class_removal import chain_name, image_shape, starting_noise
from .measuring import check_denoiser
from .samplers import Sampler, added_noise, sample

BATCH = 64  # images drawn at once: a choice
LEVELS = (3.0, 0.65, 0.5)  # sigma; the posterior is judged at the second, and the slope is from the first to the third
FITTED = 64  # images on which the figure calibrates


def record(
    network: UNet,
    chain: DDPMSchedule,
    images: int,
    steps: int,
    seed: int,
    progress: Callable[[int], object],
    sampler: Sampler = "euler_ancestral",
) -> tuple[list[Evidence], Tensor]:
    """The evidence for every class along the network's unguided chain, and the images (n, channels, height, width).

    The rest is as in :func:`observed`. ValueError if the network has no class labels.
    """
    classes, levels = network.config.num_classes, ddpm_sigmas(chain, steps)
    if classes < 2:
        raise ValueError("the denoiser knows no classes, which are the alternatives to calibrate on")
    shape = image_shape(network)
    return observed(EveryLabel(network, chain), classes, shape, levels, images, seed, progress, sampler=sampler)


@torch.no_grad()
def observed(
    predict: Predictor,
    alternatives: int,
    shape: Sequence[int],
    levels: Sequence[float],
    images: int,
    seed: int,
    progress: Callable[[int], object],
    batch: int = BATCH,
    sampler: Sampler = "euler_ancestral",
) -> tuple[list[Evidence], Tensor]:
    """The evidence for each of ``alternatives`` along the reference's own chain, and the samples, (n, ...).

    ``predict`` gives the reference and as many predictions. ``sampler`` draws samples of this ``shape`` over the noise
    ``levels``, ``batch`` at once. ``progress`` is told after each batch how many.
    """
    found, drawn = [], []
    for start in range(0, images, batch):
        size = min(batch, images - start)
        noise, generator = starting_noise(start, size, seed, shape)
        settings = Settings(prior=0.5 / alternatives, guidance_scale=0.0)
        guidance = NegativeGuidance([settings] * alternatives, Chain(levels, noise_fraction=added_noise(sampler)))

        def denoise(x: Tensor, sigma: float, guidance: NegativeGuidance = guidance) -> Tensor:
            reference, undesired = predict(x, sigma)
            return guidance(x, sigma, reference, reference, undesired)

        drawn.append(sample(denoise, noise, levels, sampler, generator))
        found.append(evidence_of(guidance))
        progress(size)
    joined = [
        Evidence(
            torch.cat([part.increments for part in parts], dim=1),
            torch.cat([part.energies for part in parts], dim=1),
            parts[0].sigmas,
        )
        for parts in zip(*found, strict=True)
    ]
    return joined, torch.cat(drawn)


def calibrated_denoiser(
    source: str, images: int, steps: int, seed: int, progress: Callable[[int], object]
) -> ModelCalibration:
    """The calibration of a denoiser. It raises what :func:`record` raises."""
    network, info = open_denoiser(source)
    evidence, _ = record(network, DDPMSchedule.named(chain_name(info)), images, steps, seed, progress)
    return ModelCalibration(calibrate(evidence, are_labels=True), info.full_name, image_shape(network))


def calibration_figure(
    images: int,
    steps: Sequence[int],
    seed: int,
    source: str = "mnist",
    judge: str = "mnist",
    samplers: Sequence[Sampler] = ("euler_ancestral",),
    precision: Precision = "float32",
) -> Iterator[dict[str, Any]]:
    """One row per sampler, step count and calibration of a denoiser, on held-out images that a classifier looks at.

    The calibrations are measured with the first sampler and step count, in float32, on 64 images of the next seed:
    none (*exact*), on all classes, and on all classes but the one that is judged (*left out*). They are judged with
    each sampler and step count, in ``precision``, by the classifier ``judge``. *cross entropy*: of p against its
    verdict at sigma 0.65, in nats; *slope*: of p at sigma 0.5 on p at sigma 3; *shares within 1.4*: of how many
    classes the measured share is within a factor of 1.4 of the classifier's count. ValueError for a denoiser and a
    classifier of other classes.
    """
    network, info = open_denoiser(source)
    classifier, seen = open_classifier(judge)
    check_denoiser(source, network, info.class_names, seen)
    chain = DDPMSchedule.named(chain_name(info))
    fitted, _ = record(network, chain, FITTED, steps[0], seed + 1, lambda size: None, samplers[0])
    found = calibrate(fitted, are_labels=True)
    others = [
        calibrate([e for other, e in enumerate(fitted) if other != label], [1 / len(fitted)] * (len(fitted) - 1))
        for label in range(len(fitted))
    ]
    calibrations = {"exact": [EXACT] * len(fitted), "all": [found] * len(fitted), "left out": others}
    network = in_precision(network, precision)
    for sampler, count in itertools.product(samplers, steps):
        judged, drawn = record(network, chain, images, count, seed, lambda size: None, sampler)
        with torch.no_grad():
            verdict = classifier(drawn).argmax(dim=1)
        for name, used in calibrations.items():
            row = {"denoiser": source, "calibration": name, "images": images, "sampler": sampler, "steps": count}
            yield row | _judged(judged, used, verdict)


def _judged(judged: Sequence[Evidence], used: Sequence[Calibration], verdict: Tensor) -> dict[str, Any]:
    sigmas = judged[0].sigmas
    top, middle, low = (min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - level)) for level in LEVELS)
    prior = 1 / len(judged)
    courses = torch.stack([track(e, c.applied(FIT.with_(prior=prior))) for e, c in zip(judged, used, strict=True)])
    truth = verdict == torch.arange(len(judged))[:, None]
    p = courses[:, middle]
    entropy = -torch.where(truth, p.log(), torch.log1p(-p)).mean()
    early, late = (courses[:, i] - courses[:, i].mean(dim=1, keepdim=True) for i in (top, low))
    shares = [share_of(e, c).mean for e, c in zip(judged, used, strict=True)]
    counts = truth.double().mean(dim=1).tolist()
    near = sum(1 / 1.4 <= share / count <= 1.4 for share, count in zip(shares, counts, strict=True) if count)
    return {
        "temperature": sum(c.temperature for c in used) / len(used),
        "drift": sum(c.nats for c in used) / len(used),
        "cross entropy": float(entropy),
        "slope": float((early * late).sum() / early.square().sum()),
        "shares within 1.4": f"{near} of {len(judged)}",
    }
