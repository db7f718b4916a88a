"""Networks of the class-removal experiments: the DDPM U-Net and a small classifier.

The U-Net is that of Ho et al. (2020, "Denoising Diffusion Probabilistic Models"), with the parameter names of
diffusers' ``UNet2DModel``, so that public weights in that layout load as they are.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Prediction = Literal["epsilon", "v"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


MOST_LEVELS = 16  # like the bounds of the fields, a choice: far above any network that this U-Net was trained as


def check_within_bounds(described: Any, least: int = 1, **most: int) -> None:
    """ValueError if a field is no whole number from ``least`` to its bound: a file must not ask for any size."""
    for name, bound in most.items():
        value = getattr(described, name)
        if not isinstance(value, int) or not least <= value <= bound:
            raise ValueError(f"{name} must be a whole number from {least} to {bound}, not {value!r}")


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a :class:`UNet`.

    ``num_classes`` of 0 makes an unconditional network; otherwise labels 0 .. num_classes - 1 are classes and the
    label ``num_classes`` is the null label (no class). ``patch_size`` folds p x p pixels into channels before the
    first convolution and unfolds them after the last, which makes small images cheap on a CPU. ``prediction`` is what
    the network predicts from x_t = alpha x_0 + s epsilon, where alpha^2 = alpha_bar and s^2 = 1 - alpha_bar. It is
    "epsilon", or "v" for alpha epsilon - s x_0 (Salimans & Ho 2022).
    """

    image_size: int
    in_channels: int
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks_per_level: int = 2
    attention_levels: tuple[int, ...] = (1,)
    num_classes: int = 0
    patch_size: int = 1
    dropout: float = 0.0
    prediction: Prediction = "epsilon"

    def __post_init__(self) -> None:
        check_within_bounds(self, image_size=4096, in_channels=64, base_channels=4096, blocks_per_level=32)
        check_within_bounds(self, patch_size=64)
        check_within_bounds(self, least=0, num_classes=100_000)
        for name, most in (("channel_multipliers", 64), ("attention_levels", MOST_LEVELS)):
            numbers = getattr(self, name)
            if len(numbers) > MOST_LEVELS or not all(isinstance(n, int) and 0 <= n <= most for n in numbers):
                raise ValueError(f"{name} must be at most {MOST_LEVELS} whole numbers up to {most}, not {numbers!r}")
        if not self.channel_multipliers:
            raise ValueError("channel_multipliers must have at least one number")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, not {self.prediction!r}")

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def timestep_embedding(timestep: Tensor, channels: int) -> Tensor:
    """Sinusoidal embedding of a timestep, (batch,) -> (batch, channels): sines first, as in Ho et al."""
    half = channels // 2
    frequencies = torch.exp(
        torch.arange(half, device=timestep.device, dtype=torch.float32) * (-math.log(10000.0) / (half - 1))
    )
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimestepEmbedding(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(embedding)))


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, embedding_width: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding_width, out_channels)
        self.norm2 = nn.GroupNorm(32, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Single-head self-attention over all pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        mixed = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + rearrange(self.to_out[0](mixed), "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the level has it."""

    downsamplers: nn.ModuleList
    upsamplers: nn.ModuleList

    def __init__(
        self, in_channels: list[int], out_channels: int, embedding_width: int, attention: bool, dropout: float
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c, out_channels, embedding_width, dropout) for c in in_channels)
        if attention:
            self.attentions = nn.ModuleList(Attention(out_channels) for _ in in_channels)

    def block(self, index: int, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.resnets[index](x, embedding)
        return self.attentions[index](x) if hasattr(self, "attentions") else x


class MiddleBlock(nn.Module):
    def __init__(self, channels: int, embedding_width: int, dropout: float) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, embedding_width, dropout) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels)])

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, embedding)), embedding)


class UNet(nn.Module):
    """The DDPM U-Net: predicts epsilon or v from x_t, (batch, channels, height, width) in and out."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.patch_size
        channels = [config.base_channels * m for m in config.channel_multipliers]
        width = 4 * config.base_channels
        levels = range(len(channels))

        self.time_embedding = TimestepEmbedding(config.base_channels, width)
        if config.num_classes:
            self.class_embedding = nn.Embedding(config.num_classes + 1, width)
        self.conv_in = nn.Conv2d(config.in_channels * patch**2, channels[0], 3, padding=1)

        skips = [channels[0]]
        previous = channels[0]
        self.down_blocks = nn.ModuleList()
        for i in levels:
            inputs = [previous] + [channels[i]] * (config.blocks_per_level - 1)
            level = Level(inputs, channels[i], width, i in config.attention_levels, config.dropout)
            skips += [channels[i]] * config.blocks_per_level
            if i != levels[-1]:
                level.downsamplers = nn.ModuleList([Downsample(channels[i])])
                skips.append(channels[i])
            self.down_blocks.append(level)
            previous = channels[i]

        self.mid_block = MiddleBlock(channels[-1], width, config.dropout)

        self.up_blocks = nn.ModuleList()
        for i in reversed(levels):
            inputs = []
            for _ in range(config.blocks_per_level + 1):
                inputs.append(previous + skips.pop())
                previous = channels[i]
            level = Level(inputs, channels[i], width, i in config.attention_levels, config.dropout)
            if i != 0:
                level.upsamplers = nn.ModuleList([Upsample(channels[i])])
            self.up_blocks.append(level)

        self.conv_norm_out = nn.GroupNorm(32, channels[0], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[0], config.in_channels * patch**2, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        """Predict epsilon or v, as ``config.prediction`` says.

        Parameters
        ----------
        x: (batch, in_channels, height, width), the VP-scaled state x_t.
        timestep: (batch,), 0 .. T - 1.
        label: (batch,) of class labels, ``num_classes`` for no class; None means no class for the whole batch.
        """
        patch = self.config.patch_size
        embedding = self.time_embedding(timestep_embedding(timestep, self.config.base_channels).to(x.dtype))
        if self.config.num_classes:
            if label is None:
                label = torch.full((x.shape[0],), self.config.num_classes, dtype=torch.long, device=x.device)
            embedding = embedding + self.class_embedding(label)

        h = self.conv_in(F.pixel_unshuffle(x, patch))
        skips = [h]
        for level in cast(Iterable[Level], self.down_blocks):
            for j in range(len(level.resnets)):
                h = level.block(j, h, embedding)
                skips.append(h)
            if hasattr(level, "downsamplers"):
                h = level.downsamplers[0](h)
                skips.append(h)

        h = self.mid_block(h, embedding)

        for level in cast(Iterable[Level], self.up_blocks):
            for j in range(len(level.resnets)):
                h = level.block(j, torch.cat([h, skips.pop()], dim=1), embedding)
            if hasattr(level, "upsamplers"):
                h = level.upsamplers[0](h, skips[-1].shape[2:])

        return F.pixel_shuffle(self.conv_out(F.silu(self.conv_norm_out(h))), patch)


class Classifier(nn.Module, ABC):
    """Tells the class of images in [-1, 1]; its features feed the Fréchet distance."""

    head: nn.Linear

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, features)."""

    def forward(self, images: Tensor) -> Tensor:
        """Class logits, (batch, num_classes)."""
        return self.head(self.features(images))


class SmallClassifier(Classifier):
    """A small convolutional classifier: three stages of two convolutions and a pooling."""

    def __init__(self, in_channels: int, num_classes: int, width: int = 32) -> None:
        super().__init__()
        channels = (in_channels, width, 2 * width, 4 * width)
        stages = [self._stage(a, b) for a, b in itertools.pairwise(channels)]
        self.body = nn.Sequential(*itertools.chain(*stages))
        self.head = nn.Linear(4 * width, num_classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            conv = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
        return [*layers, nn.MaxPool2d(2)]

    def features(self, images: Tensor) -> Tensor:
        """The means of the 4 ``width`` channels."""
        return self.body(images).mean(dim=(2, 3))


class WideBlock(nn.Module):
    """A residual block of two convolutions, each after normalisation and activation; the first may halve the size."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        left = self.conv_shortcut(h) if hasattr(self, "conv_shortcut") else x
        return left + self.conv2(F.relu(self.norm2(self.conv1(h))))


class ResidualClassifier(Classifier):
    """A wide residual network (Zagoruyko & Komodakis 2016, arXiv 1605.07146) for photographs.

    Three stages of ``BLOCKS`` blocks with ``width``, 2 ``width`` and 4 ``width`` channels; the second and third halve
    the size. With three blocks and a width of 32 it is the paper's WRN-22-2.
    """

    BLOCKS = 3
    STEM = 16  # channels of the first convolution, as in the paper

    def __init__(self, in_channels: int, num_classes: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, self.STEM, 3, padding=1, bias=False)]
        previous = self.STEM
        for stage, block in itertools.product(range(3), range(self.BLOCKS)):
            channels = width * 2**stage
            layers.append(WideBlock(previous, channels, stride=2 if stage and not block else 1))
            previous = channels
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(previous), nn.ReLU())
        self.head = nn.Linear(previous, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """The means of the 4 ``width`` channels."""
        return self.body(images).mean(dim=(2, 3))
