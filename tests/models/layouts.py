"""Networks in the layouts of others, with random weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dng_core.models.checkpoints import module_list_order
from dng_core.models.networks import UNetConfig


@pytest.fixture(scope="session")
def public_unet() -> Callable[..., torch.nn.Module]:
    """(network, seed) -> a random UNet2DModel with google/ddpm-cifar10-32's configuration, in the network's size."""
    diffusers = pytest.importorskip("diffusers")

    def make(network: UNetConfig, seed: int = 0) -> torch.nn.Module:
        torch.manual_seed(seed)
        levels = range(len(network.channel_multipliers))
        kind = ["Attn" if i in network.attention_levels else "" for i in levels]
        return diffusers.UNet2DModel(
            sample_size=network.image_size,
            in_channels=network.in_channels,
            out_channels=network.in_channels,
            act_fn="silu",
            attention_head_dim=None,
            block_out_channels=[network.base_channels * m for m in network.channel_multipliers],
            center_input_sample=False,
            down_block_types=[f"{k}DownBlock2D" for k in kind],
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            layers_per_block=network.blocks_per_level,
            mid_block_scale_factor=1,
            norm_eps=1e-6,
            norm_num_groups=32,
            time_embedding_type="positional",
            up_block_types=[f"{k}UpBlock2D" for k in reversed(kind)],
        ).eval()

    return make


@pytest.fixture(scope="session")
def class_only_state() -> Callable[[torch.nn.Module, UNetConfig], dict[str, Tensor]]:
    """The authors' names for the weights of a diffusers model: the flat list of modules, dense layers transposed."""

    def rename(model: torch.nn.Module, network: UNetConfig) -> dict[str, Tensor]:
        theirs = model.state_dict()
        state: dict[str, Tensor] = {"sigmas": torch.ones(3)}
        for number, (prefix, parts) in enumerate(module_list_order(network)):
            for their_part, our_part in (parts or {"": ""}).items():
                name = ".".join(filter(None, (prefix, our_part)))
                if f"{name}.weight" not in theirs:
                    continue  # a block without a shortcut
                key = ".".join(filter(None, (f"all_modules.{number}", their_part)))
                weight, bias = theirs[f"{name}.weight"], theirs[f"{name}.bias"]
                if their_part.startswith("NIN"):
                    state |= {f"{key}.W": weight.flatten(1).T.contiguous(), f"{key}.b": bias}
                else:
                    state |= {f"{key}.weight": weight, f"{key}.bias": bias}
        return state

    return rename
