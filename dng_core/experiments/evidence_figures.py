"""How well a network's two predictions agree: the evidence that its own unguided images bring for their class.

Where both predictions are of one and the same distribution, the images that turn into a class gather log(1 / share)
nats of evidence for it, the most there is, and keep it. Errors in which the two differ count against every image.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..calibration import Observer
from ..sampling import ddpm_sample
from ..schedules import DDPMSchedule, ddpm_sigmas
from ..settings import Settings
from .class_removal import chain_name
from .networks import channels_last
from .predictors import LabelConditional
from .weights import load_classifier, load_denoiser, shipped_classifiers, shipped_denoisers

BATCH = 128
BOUNDS = (math.inf, 3.0, 0.3, 0.0)  # of sigma: before, while and after it is decided which class an image becomes


@torch.no_grad()
def evidence_figure(images: int, steps: int, seed: int) -> Iterator[dict[str, Any]]:
    """One row per digit of the shipped MNIST network: mean evidence, in nats, of the unguided images of that digit."""
    network, info = load_denoiser(shipped_denoisers()["mnist"])
    classifier, _ = load_classifier(shipped_classifiers()["mnist"])
    chain = DDPMSchedule.named(chain_name(info))
    levels = ddpm_sigmas(chain, steps)
    network = channels_last(network)
    size = network.config.image_size
    for digit, name in enumerate(info.class_names):
        predict = LabelConditional(network, chain, digit)
        shown, increments = [], []
        for start in range(0, images, BATCH):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
            noise = torch.randn((min(BATCH, images - start), 1, size, size), generator=generator)
            observer = Observer([Settings()], chain, levels=levels)
            drawn = ddpm_sample(predict, noise, levels, observer, generator)
            shown.append(classifier(drawn).argmax(dim=1) == digit)
            increments.append(observer.evidence()[0].increments)
        yield {"class": name, "images": images} | summed(torch.cat(increments, dim=1), torch.cat(shown), levels)


def summed(increments: Tensor, shown: Tensor, levels: list[float]) -> dict[str, Any]:
    """Mean evidence of the images ``shown`` to be of the class, by the noise levels that it came at.

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
