"""The picture book in ComfyUI: a small text-to-image model as the MODEL, CLIP and VAE that the stock nodes take.

The MODEL is ComfyUI's own U-Net with the book's weights; its latents are pictures, folded into 48 channels of 16x16.
The CLIP is the book's text encoder behind ComfyUI's weighting of words. The VAE folds and unfolds, exactly.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import numpy as np
import torch
from comfy_api.latest import io
from torch import Tensor, nn

from ..dng_core.models.picture_book.drawing import SIZE
from ..dng_core.models.picture_book.networks import FOLD, PictureBook, TextEncoder, fold, unfold
from ..dng_core.models.picture_book.weights import SHIPPED_PICTURE_BOOK, PictureBookInfo, load_picture_book
from ..dng_core.models.picture_book.words import EMPTY, END, START, split, tokens
from .pixel_models import CATEGORY, SAMPLING_SETTINGS
from .run.concept import input_of

CHANNELS, SIDE = 3 * FOLD**2, SIZE // FOLD  # of a latent
KEY = "picture_book"  # of the tokens in what the tokenizer returns, as "l" is that of CLIP-L
MEMORY = 2**20  # bytes that a picture takes in a forward pass; measured on the CPU: 0.6 to 1.0 MiB


class FoldedFormat(comfy.latent_formats.LatentFormat):
    """A latent that is the picture, folded. ComfyUI's preview unfolds it and shows it as it is."""

    latent_channels = CHANNELS
    spacial_downscale_ratio = FOLD
    latent_rgb_factors = np.eye(3).tolist()
    latent_rgb_factors_reshape = staticmethod(unfold)


class PictureBookConfig(comfy.supported_models_base.BASE):
    """What ComfyUI asks about the model before the model is made."""

    unet_extra_config: dict[str, Any] = {}
    supported_inference_dtypes = [torch.float32]
    latent_format = FoldedFormat

    def __init__(self, info: PictureBookInfo) -> None:
        super().__init__(info.unet.comfyui())
        self.sampling_settings = SAMPLING_SETTINGS[info.schedule]
        self.set_inference_dtype(torch.float32, None)


def fit_last_layer(unet: Any) -> None:
    """Let the last convolution of ComfyUI's U-Net read as many channels as the block before it has.

    ComfyUI makes it for ``model_channels``, which is right where ``channel_mult`` begins with 1.
    """
    norm, _, last = unet.out
    placed = {"dtype": last.weight.dtype, "device": last.weight.device}
    unet.out[2] = type(last)(norm.num_channels, last.out_channels, 3, padding=1, **placed)


class PictureBookModel(comfy.model_base.BaseModel):
    """ComfyUI's own U-Net, predicting v, with the book's weights.

    Its last convolution is made anew, see :func:`fit_last_layer`.
    """

    def __init__(self, book: PictureBook, info: PictureBookInfo) -> None:
        super().__init__(PictureBookConfig(info), comfy.model_base.ModelType.V_PREDICTION)
        fit_last_layer(self.diffusion_model)
        self.diffusion_model.load_state_dict(book.unet.state_dict())
        self.context_dim = info.unet.context_dim

    def _apply_model(self, *args: Any, **kwargs: Any) -> Tensor:
        """The denoised picture, clamped to the range of pictures, as the pixel models are."""
        return super()._apply_model(*args, **kwargs).clamp(-1, 1)

    def memory_required(self, input_shape: Sequence[int], cond_shapes: object = None) -> float:
        """The bytes that a forward pass takes. By them ComfyUI decides how many predictions go into one batch."""
        return input_shape[0] * math.prod(input_shape[2:]) / SIDE**2 * MEMORY

    def extra_conds(self, **conditioning: Any) -> dict[str, Any]:
        """The text, as the network gets it. ComfyUI asks once for each conditioning, before sampling.

        Raises
        ------
        ValueError: for a conditioning of another text encoder, or for a latent of another size.
        """
        given, text = input_of(conditioning.get("prompt_type", "positive")), conditioning.get("cross_attn")
        if text is None or text.shape[-1] != self.context_dim:
            what = "holds no text" if text is None else f"is {text.shape[-1]} wide and not {self.context_dim}"
            raise ValueError(
                f"the conditioning {given} {what}, so that it is not of the picture book: encode it by a CLIP Text "
                f"Encode node that has the CLIP of Load Picture Book (DNG)"
            )
        channels, *sides = conditioning["noise"].shape[1:]
        if channels != CHANNELS:
            raise ValueError(
                f"`latent_image` has {channels} channels, and the picture book's have {CHANNELS}: start from Empty "
                f"Latent Image, or encode a picture with the VAE of Load Picture Book (DNG)"
            )
        if sides != [SIDE, SIDE]:
            pixels = "x".join(str(FOLD * side) for side in reversed(sides))
            raise ValueError(
                f"`latent_image` is of {pixels} pixels, and the picture book draws {SIZE}x{SIZE}: set width "
                f"and height of Empty Latent Image to {SIZE} (or scale the picture that you encode to this size)"
            )
        return super().extra_conds(**conditioning)


class Words:
    """The tokenizer: ComfyUI's weights in parentheses, the book's words."""

    def __init__(self, embedding_directory: object = None, tokenizer_data: object = None) -> None:
        """The arguments are ComfyUI's, for tokenizers that know textual inversions."""

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> dict[str, list]:
        """One row of (token, weight), or of (token, weight, number of the word, from 1).

        Raises
        ------
        ValueError: for words that the book does not know, for too many, and for a weight that is no number.
        """
        weighted = []
        escaped = comfy.sd1_clip.escape_important(text)
        for part, weight in comfy.sd1_clip.token_weights(escaped, 1.0):
            words = split(comfy.sd1_clip.unescape_important(part))
            if words and not math.isfinite(weight):
                raise ValueError(f"the weight of {' '.join(words)!r} is {weight}: give a number, such as 1.2")
            weighted += [(word, weight) for word in words]
        row = tokens([word for word, _ in weighted])
        weights = [1.0, *(weight for _, weight in weighted)]  # the first is START's
        weights += [1.0] * (len(row) - len(weights))
        numbers = [i if 0 < i <= len(weighted) else 0 for i in range(len(row))]
        return {KEY: [list(zip(row, weights, *([numbers] if return_word_ids else []), strict=True))]}

    def state_dict(self) -> dict[str, Tensor]:
        """What ComfyUI saves of a tokenizer beside the weights: nothing."""
        return {}


class WeightedText(nn.Module, comfy.sd1_clip.ClipTokenWeightEncoder):
    """The text encoder as ComfyUI calls it, in float32. A weight moves a word away from that of an empty prompt."""

    special_tokens = {"start": START, "end": END, "pad": EMPTY}
    dtypes = {torch.float32}

    def __init__(self, encoder: TextEncoder, device: torch.device, **options: Any) -> None:
        super().__init__()
        self.encoder = encoder.to(device)

    def encode(self, rows: list[list[int]]) -> tuple[Tensor, None]:
        """Rows of tokens -> their context, (rows, tokens, width); there is no pooled output."""
        return self.encoder(torch.tensor(rows, device=self.encoder.tokens.weight.device)), None

    def encode_token_weights(self, token_weight_pairs: dict[str, list]) -> tuple[Tensor, None]:
        if KEY not in token_weight_pairs:
            raise ValueError("the picture book's CLIP has one prompt: use the node CLIP Text Encode")
        return super().encode_token_weights(token_weight_pairs[KEY])

    def set_clip_options(self, options: dict[str, Any]) -> None:
        if options.get("layer") not in (None, -1):
            raise ValueError(
                f"the picture book was trained with all layers of its text encoder: remove CLIP Set Last Layer "
                f"({options['layer']})"
            )

    def reset_clip_options(self) -> None:
        """There are none."""


class Folding(nn.Module):
    """What stands in the VAE where others have networks: it has no weights."""

    def encode(self, pictures: Tensor) -> Tensor:
        return fold(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        if latents.shape[1] != CHANNELS:
            raise ValueError(
                f"the latent has {latents.shape[1]} channels, and the picture book's have {CHANNELS}: decode it with "
                f"the VAE of the model that drew it"
            )
        return unfold(latents)


class FoldingVAE(comfy.sd.VAE):
    """ComfyUI's VAE for models of pixels, with folding."""

    def __init__(self) -> None:
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
        self.first_stage_model = Folding()
        self.downscale_ratio = self.upscale_ratio = FOLD
        self.latent_channels = CHANNELS
        self.patcher = _patcher(self.first_stage_model, self.device, comfy.model_management.vae_offload_device())


def _patcher(module: nn.Module, load: torch.device, offload: torch.device) -> comfy.model_patcher.ModelPatcher:
    """The plain ModelPatcher: so small a model is never loaded piece by piece."""
    return comfy.model_patcher.ModelPatcher(module, load_device=load, offload_device=offload)


def load_model(path: Path) -> comfy.model_patcher.ModelPatcher:
    """The book's U-Net as ComfyUI's MODEL. It raises what :func:`load_picture_book` raises."""
    return _model(path, *load_picture_book(path))


def load_all(path: Path) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, FoldingVAE]:
    """MODEL, CLIP and VAE. It raises what :func:`load_picture_book` raises."""
    book, info = load_picture_book(path)
    text = comfy.supported_models_base.ClipTarget(Words, functools.partial(WeightedText, book.text))
    return _model(path, book, info), comfy.sd.CLIP(text, disable_dynamic=True), FoldingVAE()


def _model(path: Path, book: PictureBook, info: PictureBookInfo) -> comfy.model_patcher.ModelPatcher:
    devices = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    patcher = _patcher(PictureBookModel(book, info), *devices)
    patcher.cached_patcher_init = (load_model, (path,))
    return patcher


class LoadPictureBook(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGLoadPictureBook",
            display_name="Load Picture Book (DNG)",
            category=CATEGORY,
            is_experimental=True,
            description="Loads a small text-to-image model that comes with DNG. It draws scenes of 64x64 pixels from "
            "prompts of a few words, in seconds on any machine.",
            search_aliases=["picture book", "text to image", "small model", "checkpoint", "toy model", "dng"],
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="A MODEL for any sampler. It draws pictures of 64x64 pixels."),
                io.Clip.Output(
                    tooltip="A CLIP for CLIP Text Encode. It knows places, times of day, colours and eighteen things; "
                    "a prompt with another word is answered by the list of those that it knows."
                ),
                io.Vae.Output(tooltip="A VAE for VAE Decode and VAE Encode. It loses nothing."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_all(SHIPPED_PICTURE_BOOK))


NODES = [LoadPictureBook]
