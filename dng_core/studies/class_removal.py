"""One point of the class-removal study: which images to draw, and drawing them.

A :class:`Point` says everything that decides the images; its :meth:`~Point.key` names them in the cache.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..economy import Economy
from ..kernels import ReverseKernel
from ..methods import STUDIED, MethodSettings, guidance_by
from ..models.checkpoints import CIFAR10_NETWORK, open_denoiser
from ..models.networks import UNet
from ..models.predictors import LabelConditional, NetworkPair, Precision, in_precision
from ..models.weight_files import DenoiserInfo
from ..posterior import Chain
from ..sampling import ddpm_sample
from ..schedules import ChainName, DDPMSchedule, IntegratedOffset, ddpm_sigmas, karras_sigmas

NONE = "none"
METHOD_NAMES = {
    NONE: "none",
    "negative_prompting": "NP",
    "safe_latent_diffusion": "SLD",
    "contrastive_cfg": "CCFG",
    "dng": "DNG",
}
TRACED = 8  # a choice: traces are kept of the first 8 images, and of the first 8 that still show the class
KEY_LENGTH = 24  # hexadecimal digits of a SHA-256: a choice
VERSION = 2  # part of every key: raise it with each change that alters the images of a point

Spacing = Literal["ddpm", "karras"]
Variance = Literal["posterior", "forward"]


@dataclass(frozen=True)
class Point:
    """What to draw. The noise depends on ``seed``, ``batch`` and ``images`` alone, never on the method.

    Parameters
    ----------
    denoiser: source of the reference network (:func:`~.checkpoints.open_denoiser`).
    class_only: source of the network that draws the forbidden class alone; empty to use the denoiser's labels.
    weights: digest of both networks' weights, so that other weights under the same name are another point.
    forbidden: the class to remove; None without guidance.
    settings: the guidance's settings; None without guidance.
    undesired_every: N, to predict the class at every N-th step only (:meth:`~dng_core.economy.Economy.every`).
    precision: in which the networks compute.
    """

    denoiser: str
    class_only: str
    weights: str
    forbidden: int | None
    settings: MethodSettings | None
    steps: int
    images: int
    batch: int
    seed: int
    spacing: Spacing = "ddpm"
    variance: Variance = "posterior"
    undesired_every: int = 1
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for name in ("steps", "images", "batch", "undesired_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if (self.forbidden is None) != (self.settings is None):
            raise ValueError("guidance needs both a forbidden class and settings; without guidance, neither")

    @property
    def method(self) -> str:
        """The name of the method in tables and plots."""
        return METHOD_NAMES[self.settings.method if self.settings else NONE]

    @property
    def evaluations(self) -> int:
        """How many predictions for single images the point costs."""
        return sum(batch.evaluations for batch in self.batches())

    def batches(self) -> list["Batch"]:
        """The point's images in parts, each of which is drawn at once."""
        return [Batch(self, start) for start in range(0, self.images, self.batch)]

    def key(self) -> str:
        """A hash of everything that decides the images."""
        named = self.to_dict() | {"version": VERSION}
        named |= {"denoiser": "", "class_only": bool(self.class_only)}  # the weights' digest names the networks
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]

    def to_dict(self) -> dict[str, Any]:
        settings = None if self.settings is None else {"method": self.settings.method, **asdict(self.settings)}
        return asdict(self) | {"settings": settings}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Point":
        settings = None
        if raw["settings"] is not None:
            chosen = dict(raw["settings"])
            settings = STUDIED[chosen.pop("method")](**chosen)
        return cls(**raw | {"settings": settings})


@dataclass(frozen=True)
class Batch:
    """Some images of a point that are drawn at once; ``start`` is the number of the first."""

    point: Point
    start: int

    @property
    def images(self) -> int:
        return min(self.point.batch, self.point.images - self.start)

    @property
    def evaluations(self) -> int:
        """How many predictions for single images the batch costs."""
        guided = 0 if self.point.settings is None else math.ceil(self.point.steps / self.point.undesired_every)
        return (self.point.steps + guided) * self.images


@dataclass(frozen=True)
class Drawn:
    """The images of a point or batch, (n, channels, height, width) uint8, and traces of some of them.

    ``traced``: (k,) indices of the traced images. ``sigmas``: (steps,) levels.
    ``posterior`` and ``scale``: (steps, k). Without guidance, nothing is traced, and these two are empty.
    """

    images: np.ndarray
    traced: np.ndarray
    sigmas: np.ndarray
    posterior: np.ndarray
    scale: np.ndarray
    seconds: float = 0.0


@lru_cache(maxsize=4)
def network(source: str, device: str, precision: Precision = "float32") -> tuple[UNet, DenoiserInfo]:
    """A denoiser on its device. It is cached, because a sweep asks for it again and again."""
    unet, info = open_denoiser(source, CIFAR10_NETWORK)
    return in_precision(unet.to(device), precision), info


def predictor_of(point: Point, device: str) -> LabelConditional | NetworkPair:
    """The networks of a point as one function; ValueError if they don't fit each other or the forbidden class."""
    reference, info = network(point.denoiser, device, point.precision)
    chain = DDPMSchedule.named(chain_name(info))
    if reference.config.num_classes and not point.class_only:
        return LabelConditional(reference, chain, point.forbidden)
    if point.forbidden is not None and not point.class_only:
        raise ValueError(
            f"{point.denoiser} knows no labels, so class {point.forbidden} needs a class-only network: name it under "
            f"[class_only] in the experiment's file"
        )
    undesired = None
    if point.class_only and point.forbidden is not None:
        undesired, _ = network(point.class_only, device, point.precision)
    return NetworkPair(reference, undesired, chain)


def chain_name(info: DenoiserInfo) -> ChainName:
    """The training chain that a denoiser's file names."""
    if info.schedule not in ("linear", "scaled_linear"):
        raise ValueError(f"the denoiser {info.name} was trained on an unknown chain, {info.schedule!r}")
    return info.schedule  # type: ignore[return-value]


def noise_levels(chain: DDPMSchedule, spacing: Spacing, steps: int) -> list[float]:
    """``steps`` sampling levels of the chain in the given spacing."""
    if spacing == "karras":
        return karras_sigmas(steps, float(chain.sigmas[0]), float(chain.sigmas[-1]))
    return ddpm_sigmas(chain, steps)


def draw(point: Point, device: str = "cpu") -> Drawn:
    """Draw all of a point's images, one batch after the other; raises what :func:`draw_batch` raises."""
    return joined([draw_batch(batch, device) for batch in point.batches()])


@torch.no_grad()
def draw_batch(batch: Batch, device: str = "cpu") -> Drawn:
    """Draw a batch of images by DDPM ancestral sampling.

    Raises
    ------
    FloatingPointError: if an image, or a prediction on its way, is not finite.
    ValueError: if networks and point don't fit.
    """
    point = batch.point
    predict = predictor_of(point, device)
    between = predictor_of(replace(point, forbidden=None, settings=None), device) if point.settings else None
    reference = predict.network if isinstance(predict, LabelConditional) else predict.reference
    levels = noise_levels(predict.chain, point.spacing, point.steps)
    noise, generator = starting_noise(batch.start, batch.images, point.seed, image_shape(reference))
    guidance = None
    if point.settings:
        fraction = partial(noise_fraction, point.variance, levels)
        chain = Chain(levels, IntegratedOffset(predict.chain), noise_fraction=fraction)
        guidance = guidance_by([point.settings], chain, economies=[Economy.every(point.undesired_every)])
    drawn = ddpm_sample(predict, noise.to(device), levels, guidance, generator, point.variance, between)
    if not bool(drawn.isfinite().all()) or (guidance is not None and guidance.ignored()):
        at = f" by {point.method} at scale {point.settings.guidance_scale:g}" if point.settings else ""
        lower = ", or lower guidance_scale and max_scale" if point.settings else ""
        networks = " or ".join(filter(None, (point.denoiser, point.class_only)))
        raise FloatingPointError(f"{networks} predicted images that are not finite{at}: check the weights{lower}")
    trace = guidance.trace() if guidance else None
    nothing = np.zeros((0, 0), dtype=np.float32)
    return Drawn(
        images=((drawn.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy(),
        traced=np.arange(batch.images if trace else 0),
        sigmas=np.array(levels),
        posterior=trace.posterior[:, 0].numpy() if trace else nothing,
        scale=trace.scale[:, 0].numpy() if trace else nothing,
    )


def joined(parts: Sequence[Drawn]) -> Drawn:
    """The batches of a point, given in their order, as one. Either all of their images are traced or none."""
    images = np.concatenate([part.images for part in parts])
    return Drawn(
        images=images,
        traced=np.arange(len(images) if len(parts[0].traced) else 0),
        sigmas=parts[0].sigmas,
        posterior=np.concatenate([part.posterior for part in parts], axis=1),
        scale=np.concatenate([part.scale for part in parts], axis=1),
        seconds=sum(part.seconds for part in parts),
    )


def image_shape(network: UNet) -> tuple[int, int, int]:
    """(channels, height, width) of what a network draws."""
    return network.config.in_channels, network.config.image_size, network.config.image_size


def starting_noise(start: int, count: int, seed: int, shape: Sequence[int]) -> tuple[Tensor, torch.Generator]:
    """Standard normal noise for ``count`` images from number ``start`` on, and the generator for later noise."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
    return torch.randn((count, *shape), generator=generator), generator


def noise_fraction(variance: Variance, levels: Sequence[float], sigma: float, next_sigma: float) -> float:
    """The variance that DDPM's steps add from ``sigma`` to ``next_sigma``, as a share of the exact kernel's."""
    if variance == "posterior":
        return 1.0  # exact kernels in a row make an exact kernel
    added = 0.0
    for a, b in itertools.pairwise(levels[levels.index(sigma) : levels.index(next_sigma) + 1]):
        step = ReverseKernel(a, b)
        added = step.ratio**2 * added + step.forward_variance
    return added / ReverseKernel(sigma, next_sigma).variance


def keep_traces(drawn: Drawn, forbidden: np.ndarray) -> Drawn:
    """Keep only the traces of the first images and of the first images for which ``forbidden``, (n,) bool, is true."""
    if not len(drawn.traced):
        return drawn
    chosen = sorted({*range(min(TRACED, len(drawn.images))), *np.flatnonzero(forbidden)[:TRACED].tolist()})
    return Drawn(
        drawn.images, drawn.traced[chosen], drawn.sigmas, drawn.posterior[:, chosen], drawn.scale[:, chosen],
        drawn.seconds,
    )  # fmt: skip


def weights_digest(*sources: str) -> str:
    """A digest of the weights that the sources hold, whatever files they come from."""
    digest = hashlib.sha256()
    for source in filter(None, sources):
        unet, _ = open_denoiser(source, CIFAR10_NETWORK)
        for name, tensor in sorted(unet.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:KEY_LENGTH]
