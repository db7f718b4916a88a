"""What the tests of training share: a network that trains in a moment, and when weights are the same."""

import torch

from dng_core.models.networks import UNetConfig

NETWORK = UNetConfig(8, 1, 32, channel_multipliers=(1,), blocks_per_level=1, attention_levels=(), num_classes=3)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
