"""The two predictions that guidance compares, from one label-conditional network or from a pair of networks.

All are :data:`~dng_core.sampling.Predictor` functions, (state, sigma) -> (reference, [undesired]), for networks
on a training chain. The denoised estimates are kept in the images' range -1 .. 1, as DDPM does.
"""

import math
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from ..schedules import DDPMSchedule
from .networks import Prediction, UNet

Network = TypeVar("Network", bound=nn.Module)
Precision = Literal["float32", "bfloat16"]
"""The numbers in which a network computes. Its states, and all of guidance, stay in float32."""


def denoised(network: UNet, chain: DDPMSchedule, x: Tensor, sigma: float, label: Tensor | None = None) -> Tensor:
    """The denoised estimate D of VE states x, (n, channels, height, width), clamped to -1 .. 1; ``label``: (n,)."""

    def predict(x_t: Tensor, timestep: Tensor) -> Tensor:
        return network(x_t.to(dtype_of(network)), timestep, label)

    return estimate(predict, network.config.prediction, chain, x, sigma)


def estimate(
    predict: Callable[[Tensor, Tensor], Tensor], prediction: Prediction, chain: DDPMSchedule, x: Tensor, sigma: float
) -> Tensor:
    """The denoised estimate D of VE states x by a network on VP states and timesteps, (n,); clamped to -1 .. 1.

    The prediction may come in another precision than the states; D has theirs.
    D = x - sigma epsilon, or D = (x - sigma sqrt(1 + sigma^2) v) / (1 + sigma^2), by what the network predicts.

    A prediction that is not finite becomes NaN, because the clamp would hide infinity.
    """
    timestep = int(chain.timestep(torch.tensor(sigma, dtype=torch.float64)))
    scale = (1 + sigma**2) ** 0.5
    predicted = predict(x / scale, torch.full((len(x),), timestep, device=x.device)).to(x.dtype)
    clean = x - sigma * predicted if prediction == "epsilon" else x / scale**2 - sigma / scale * predicted
    return torch.where(predicted.isfinite(), clean, math.nan).clamp(-1, 1)


def dtype_of(network: nn.Module) -> torch.dtype:
    """The numbers in which a network computes: those of its weights."""
    return next(network.parameters()).dtype


def in_precision(network: Network, precision: Precision) -> Network:
    """The network, changed in place: it then computes in this precision, and takes states in it."""
    return network.to(getattr(torch, precision))


class LabelConditional:
    """Both predictions from one label-conditional network, evaluated in one batch of 2 n.

    Parameters
    ----------
    label: the undesired class; with None there is only the reference, which has the null label.
    """

    def __init__(self, network: UNet, chain: DDPMSchedule, label: int | None) -> None:
        classes = network.config.num_classes
        if classes == 0:
            raise ValueError("the network knows no labels: give a class-only network beside it, or a labelled one")
        if label is not None and not 0 <= label < classes:
            raise ValueError(f"label {label} is not one of the network's classes, 0 .. {classes - 1}")
        self.network, self.chain, self.label = network, chain, label

    def __call__(self, x: Tensor, sigma: float) -> tuple[Tensor, list[Tensor]]:
        if self.label is None:
            return denoised(self.network, self.chain, x, sigma), []
        labels = torch.full((2 * len(x),), self.network.config.num_classes, dtype=torch.long, device=x.device)
        labels[len(x) :] = self.label
        reference, undesired = denoised(self.network, self.chain, torch.cat([x, x]), sigma, labels).chunk(2)
        return reference, [undesired]


class EveryLabel:
    """The reference, and the predictions under every class of one label-conditional network, one after the other."""

    def __init__(self, network: UNet, chain: DDPMSchedule) -> None:
        self.network, self.chain = network, chain

    def __call__(self, x: Tensor, sigma: float) -> tuple[Tensor, list[Tensor]]:
        classes = self.network.config.num_classes
        labels = (torch.full((len(x),), label, device=x.device) for label in (classes, *range(classes)))
        reference, *undesired = (denoised(self.network, self.chain, x, sigma, label) for label in labels)
        return reference, undesired


class NetworkPair:
    """The predictions of an unconditional network and of one trained on the undesired class alone (or None)."""

    def __init__(self, reference: UNet, undesired: UNet | None, chain: DDPMSchedule) -> None:
        if undesired is not None:
            ours, theirs = reference.config, undesired.config
            if (ours.image_size, ours.in_channels) != (theirs.image_size, theirs.in_channels):
                raise ValueError(
                    f"the two networks draw different images: {ours.in_channels}x{ours.image_size} and "
                    f"{theirs.in_channels}x{theirs.image_size} (channels x size); they must be trained on one data set"
                )
        self.reference, self.undesired, self.chain = reference, undesired, chain

    def __call__(self, x: Tensor, sigma: float) -> tuple[Tensor, list[Tensor]]:
        networks = [self.reference] if self.undesired is None else [self.reference, self.undesired]
        reference, *undesired = (denoised(network, self.chain, x, sigma) for network in networks)
        return reference, undesired
