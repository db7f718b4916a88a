"""The reverse kernel between any two noise levels, in the variance-exploding (VE) frame, x = x_0 + sigma n.

Noise levels are Python floats: they are known before the sampling loop, and arithmetic on them never touches the
device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReverseKernel:
    """The reverse transition p(x' | x, x_0 = D) = N(r x + (1 - r) D, variance) from sigma to sigma', in the VE frame.

    It is DDPM's posterior kernel (Ho et al. 2020, eq. 6 and 7) for a jump of any size, and what ancestral samplers
    draw from at eta = 1.
    """

    sigma: float
    next_sigma: float

    def __post_init__(self) -> None:
        if not 0 <= self.next_sigma < self.sigma:
            raise ValueError(f"a reverse kernel goes down in noise, not from {self.sigma} to {self.next_sigma}")

    @property
    def ratio(self) -> float:
        """r = sigma'^2 / sigma^2; 0 from infinite noise."""
        return (self.next_sigma / self.sigma) ** 2

    @property
    def variance(self) -> float:
        """s^2 = sigma'^2 (1 - r)."""
        return self.next_sigma**2 * (1 - self.ratio)

    @property
    def vp_variance(self) -> float:
        """The same variance in the VP frame, s^2 / (1 + sigma'^2): beta-tilde for neighbouring DDPM timesteps."""
        return self.variance / (1 + self.next_sigma**2)

    @property
    def forward_variance(self) -> float:
        """The forward step's variance, beta in the VP frame, brought to the VE frame: DDPM's other choice of noise."""
        fraction = 1 / (1 + self.sigma**2)
        return (1 + self.next_sigma**2) * (1 - (1 + self.next_sigma**2) * fraction)

    def mean(self, x: Tensor, denoised: Tensor) -> Tensor:
        """r x + (1 - r) D for a VE state x; both tensors of one shape."""
        return self.ratio * x + (1 - self.ratio) * denoised


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """(batch,) -> (batch, 1, ..., 1), to be multiplied with a latent of the rank of ``like``."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def at_least_float32(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, or as it is where it is more precise already."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def float32_copy(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` in float32, or in its own precision where that is higher."""
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32, copy=True)


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, which is not waited for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
