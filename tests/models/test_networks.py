"""The U-Net is diffusers' UNet2DModel, and its label-conditional form treats the null label as one more class."""

import pytest
import torch

from dng_core.models.networks import ResidualClassifier, UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")


def test_equals_diffusers_unet_with_the_same_state_dict():
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        center_input_sample=False,
        flip_sin_to_cos=False,
        freq_shift=1,
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        attention_head_dim=None,
        norm_eps=1e-6,
    ).eval()
    ours = UNet(UNetConfig(16, 3, base_channels=32, channel_multipliers=(1, 2), attention_levels=(1,))).eval()
    ours.load_state_dict(theirs.state_dict())

    x, timestep = torch.randn(3, 3, 16, 16), torch.tensor([0, 499, 999])
    with torch.no_grad():
        assert (ours(x, timestep) - theirs(x, timestep).sample).abs().max() <= 1e-5


def test_no_label_is_the_null_label():
    torch.manual_seed(0)
    config = UNetConfig(8, 1, base_channels=32, channel_multipliers=(1,), blocks_per_level=1, num_classes=3)
    model = UNet(config).eval()
    x, timestep = torch.randn(2, 1, 8, 8), torch.tensor([10, 900])
    with torch.no_grad():
        null = model(x, timestep, torch.tensor([3, 3]))
        assert torch.equal(model(x, timestep), null)
        assert not torch.allclose(model(x, timestep, torch.tensor([0, 1])), null)


def test_patches_keep_the_size_and_cover_every_pixel():
    torch.manual_seed(0)
    config = UNetConfig(28, 1, 32, (1, 1), blocks_per_level=1, num_classes=10, patch_size=2)
    model = UNet(config).eval()
    x = torch.randn(2, 1, 28, 28, requires_grad=True)
    out = model(x, torch.tensor([5, 5]))
    assert out.shape == x.shape
    out.square().sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).all()


def test_a_residual_classifier_is_the_wide_network_of_its_paper():
    """WRN-22-2: 1.1 million weights, which halve the size twice; a block whose branch is 0 changes nothing."""
    classifier = ResidualClassifier(3, 10, width=32).eval()
    assert 1.05e6 < sum(p.numel() for p in classifier.parameters()) < 1.1e6
    sizes: list[tuple[int, ...]] = []
    for block in classifier.body[1:10]:
        block.register_forward_hook(lambda block, given, gave: sizes.append(tuple(gave.shape[1:])))
    with torch.no_grad():
        assert classifier(torch.rand(2, 3, 32, 32)).shape == (2, 10)
        assert classifier.features(torch.rand(2, 3, 32, 32)).shape == (2, 128)
        block = classifier.body[2]
        block.conv2.weight.zero_()
        x = torch.rand(1, 32, 8, 8)
        assert torch.equal(block(x), x)
    assert sizes[:9] == [(32, 32, 32)] * 3 + [(64, 16, 16)] * 3 + [(128, 8, 8)] * 3
