"""The picture book in ComfyUI: its weights are those of ComfyUI's own U-Net."""

from dataclasses import replace

import pytest
import torch

from dng_core.models.picture_book.networks import CrossUNet, CrossUNetConfig

DEEP = CrossUNetConfig(
    48, 32, (1, 2, 3), (1, 0, 2), (1, 0, 2), (1, 2, 0, 1, 2, 1), transformer_depth_middle=2, context_dim=24
)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """All parameters random, for many layers begin at 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.2 * noise)
    return module.requires_grad_(False)


@pytest.mark.parametrize("config", [CrossUNetConfig(), DEEP, replace(DEEP, num_head_channels=16)])
def test_comfyuis_own_unet_takes_the_weights_and_predicts_the_same(comfyui, config):
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    ours, theirs = randomised(CrossUNet(config)), UNetModel(**config.comfyui())
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, config.in_channels, 16, 16, generator=generator)
    context = torch.randn(3, 7, config.context_dim, generator=generator)
    timestep = torch.tensor([0.0, 400.0, 999.0])
    expected = ours(x, timestep, context)
    with torch.no_grad():
        found = theirs(x, timestep, context)
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (ours(x, timestep, context.flip(0)) - expected).abs().max() > 1e-3  # the text matters
