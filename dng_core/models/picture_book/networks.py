"""The picture book's networks: a text encoder of word tokens, and a U-Net with cross attention.

The U-Net is that of latent diffusion (Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion
Models"), with the parameter names and the arithmetic of Stable Diffusion's, so that ComfyUI's own U-Net takes its
weights as they are (but for the last convolution's, where ``channel_mult`` begins with another number than 1). Its
latent holds a picture's pixels, folded: 4 x 4 of them become 48 channels.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..networks import MOST_LEVELS, check_within_bounds

MOST_BLOCKS = 64  # of a kind in all; like the bounds of the fields, a choice (Stable Diffusion XL has 36 at most)
GROUPS = 32  # of each normalisation, as in Stable Diffusion
FOLD = 4  # pixels on a side that become one latent pixel: 64x64 pictures in 3 channels are 16x16 latents in 48


def fold(images: Tensor) -> Tensor:
    """Pictures (n, 3, height, width) -> latents (n, 48, height / 4, width / 4), which :func:`unfold` turns back."""
    return F.pixel_unshuffle(images, FOLD)


def unfold(latents: Tensor) -> Tensor:
    """Latents (n, 48, height, width) -> pictures (n, 3, 4 height, 4 width)."""
    return F.pixel_shuffle(latents, FOLD)


@dataclass(frozen=True)
class TextConfig:
    """Shape of a :class:`TextEncoder`; ``words`` counts the vocabulary, ``length`` the tokens of a prompt."""

    words: int
    length: int
    width: int = 128
    layers: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        check_within_bounds(self, words=100_000, length=4096, width=4096, layers=64, heads=4096)
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, {self.heads}, not {self.width}")


@dataclass(frozen=True)
class CrossUNetConfig:
    """Shape of a :class:`CrossUNet`, in the words of ComfyUI's ``UNetModel``, whose other options are fixed.

    Parameters
    ----------
    num_res_blocks: residual blocks of each level on the way down; there is one more on the way up.
    transformer_depth: transformers after each residual block on the way down, from the first level to the last.
    transformer_depth_output: the same on the way up, in the same order (its last entry belongs to the first block).
    """

    in_channels: int = 3 * FOLD**2
    model_channels: int = 64
    channel_mult: tuple[int, ...] = (2, 2)  # v is made of 128 channels, since its noise alone fills 48
    num_res_blocks: tuple[int, ...] = (0, 1)
    transformer_depth: tuple[int, ...] = (1,)  # at 8x8, where a cat is one place large
    transformer_depth_output: tuple[int, ...] = (0, 1, 1)
    transformer_depth_middle: int = 1
    context_dim: int = 128
    num_head_channels: int = 32

    def __post_init__(self) -> None:
        check_within_bounds(self, in_channels=4096, model_channels=4096, context_dim=4096, num_head_channels=4096)
        check_within_bounds(self, least=0, transformer_depth_middle=MOST_BLOCKS)
        self._check_row("channel_mult", range(1, MOST_LEVELS + 1), least=1, most=64 * MOST_LEVELS)
        levels = len(self.channel_mult)
        self._check_row("num_res_blocks", range(levels, levels + 1))
        blocks = sum(self.num_res_blocks)
        self._check_row("transformer_depth", range(blocks, blocks + 1))
        self._check_row("transformer_depth_output", range(blocks + levels, blocks + levels + 1))
        if self.model_channels % GROUPS:
            raise ValueError(f"model_channels must be a multiple of {GROUPS}, not {self.model_channels}")
        widths = {self.model_channels * mult for mult in (self.channel_mult if blocks else (1, *self.channel_mult))}
        if any(width % self.num_head_channels for width in widths):
            raise ValueError(
                f"num_head_channels must divide the channels of each level ({', '.join(map(str, sorted(widths)))}), "
                f"not {self.num_head_channels}"
            )

    def _check_row(self, name: str, lengths: range, least: int = 0, most: int = MOST_BLOCKS) -> None:
        """ValueError where a field is no row of whole numbers of one of these lengths, or sums up to too much."""
        row = getattr(self, name)
        if (
            not isinstance(row, tuple)
            or len(row) not in lengths
            or not all(isinstance(number, int) and number >= least for number in row)
            or sum(row) > most
        ):
            count = " to ".join(str(end) for end in dict.fromkeys((lengths[0], lengths[-1])))
            raise ValueError(
                f"{name} must be {count} whole numbers of at least {least} and together at most {most}, not {row!r}"
            )

    def comfyui(self) -> dict[str, Any]:
        """The arguments that make ComfyUI's ``UNetModel`` of this shape."""
        own = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return own | {
            "image_size": 16,  # which that network never reads
            "out_channels": self.in_channels,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": True,
            "legacy": False,
        }


class TextEncoder(nn.Module):
    """Word tokens (batch, length) -> a context (batch, length, width): a transformer that sees all of a prompt."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.words, config.width)
        self.positions = nn.Parameter(0.02 * torch.randn(config.length, config.width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.width, config.heads, 2 * config.width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.tokens.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encode(self.tokens(tokens))

    def encode(self, embedded: Tensor) -> Tensor:
        """The context of words that are already embedded, (batch, length, width)."""
        x = embedded + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def timestep_embedding(timestep: Tensor, channels: int) -> Tensor:
    """Sinusoidal embedding of a timestep, (batch,) -> (batch, channels): cosines first, as in Stable Diffusion."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=timestep.device).float() / half)
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    """Two convolutions, with the timestep's embedding added between them."""

    def __init__(self, in_channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(width, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, out_channels),
            nn.SiLU(),
            nn.Identity(),  # the place of dropout, so that the convolution has Stable Diffusion's name
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        _zero(self.out_layers[3])

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Multi-head attention of x, (batch, n, width), to itself or to a context (batch, m, context_dim)."""

    def __init__(self, width: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim or width, width, bias=False)
        self.to_v = nn.Linear(context_dim or width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        parts = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.heads) for part in parts)
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class GatedGELU(nn.Module):
    """A linear map whose second half gates the first (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * out_width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GatedGELU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self attention, cross attention to the text, and a feed-forward network."""

    def __init__(self, width: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.attn1 = Attention(width, heads)
        self.ff = FeedForward(width)
        self.attn2 = Attention(width, heads, context_dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, (batch, channels, height, width) in and out."""

    def __init__(self, channels: int, head_channels: int, depth: int, context_dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        blocks = (TransformerBlock(channels, channels // head_channels, context_dim) for _ in range(depth))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(channels, channels)
        _zero(self.proj_out)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + rearrange(self.proj_out(h), "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Sequential):
    """Modules in a row; each gets what it needs of the timestep's embedding and the text's context."""

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        for module in self:
            if isinstance(module, ResBlock):
                x = module(x, embedding)
            elif isinstance(module, SpatialTransformer):
                x = module(x, context)
            else:
                x = module(x)
        return x


class CrossUNet(nn.Module):
    """Predicts v = alpha epsilon - s x_0 from x_t = alpha x_0 + s epsilon, (batch, channels, height, width)."""

    def __init__(self, config: CrossUNetConfig) -> None:
        super().__init__()
        self.config = config
        base = config.model_channels
        width = 4 * base
        widths = [base * mult for mult in config.channel_mult]
        self.time_embed = nn.Sequential(nn.Linear(base, width), nn.SiLU(), nn.Linear(width, width))

        def transformers(channels: int, depth: int) -> Iterator[nn.Module]:
            if depth:
                yield SpatialTransformer(channels, config.num_head_channels, depth, config.context_dim)

        down = iter(config.transformer_depth)
        stages = [Stage(nn.Conv2d(config.in_channels, base, 3, padding=1))]
        channels, skips = base, [base]
        for level, out in enumerate(widths):
            for _ in range(config.num_res_blocks[level]):
                stages.append(Stage(ResBlock(channels, out, width), *transformers(out, next(down))))
                channels = out
                skips.append(channels)
            if level + 1 < len(widths):
                stages.append(Stage(Downsample(channels)))
                skips.append(channels)
        self.input_blocks = nn.ModuleList(stages)

        self.middle_block = Stage(
            ResBlock(channels, channels, width),
            *transformers(channels, config.transformer_depth_middle),
            ResBlock(channels, channels, width),
        )

        up = iter(reversed(config.transformer_depth_output))
        stages = []
        for level in reversed(range(len(widths))):
            for i in range(config.num_res_blocks[level] + 1):
                parts: list[nn.Module] = [ResBlock(channels + skips.pop(), widths[level], width)]
                channels = widths[level]
                parts += transformers(channels, next(up))
                if level and i == config.num_res_blocks[level]:
                    parts.append(Upsample(channels))
                stages.append(Stage(*parts))
        self.output_blocks = nn.ModuleList(stages)
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, config.in_channels, 3, padding=1)
        )
        _zero(self.out[2])

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """Predict v.

        Parameters
        ----------
        x: (batch, channels, height, width), the VP-scaled state x_t of a latent.
        timestep: (batch,), 0 .. T - 1.
        context: (batch, tokens, context_dim), from the text encoder.
        """
        embedding = self.time_embed(timestep_embedding(timestep, self.config.model_channels).to(x.dtype))
        h, skips = x, []
        for stage in self.input_blocks:
            h = stage(h, embedding, context)
            skips.append(h)
        h = self.middle_block(h, embedding, context)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding, context)
        return self.out(h)


class PictureBook(nn.Module):
    """The text encoder and the U-Net, which are trained together."""

    def __init__(self, text: TextConfig, unet: CrossUNetConfig) -> None:
        super().__init__()
        self.text, self.unet = TextEncoder(text), CrossUNet(unet)

    def forward(self, x: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        """v of x_t, (batch, 48, height, width), for prompts of word tokens, (batch, length)."""
        return self.unet(x, timestep, self.text(tokens))


def _zero(layer: nn.Module) -> None:
    """Let a layer begin at 0, so that its block begins as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
