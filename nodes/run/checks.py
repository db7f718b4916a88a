"""What is checked before a run: conditionings, and what samplers need."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..checks import check_filled, shape_text

ABOUT_SHAPES = re.compile(r"shape|size|dimension|channels|values to unpack|out of range|NoneType", re.IGNORECASE)
"""What the errors of torch and einops say where tensors do not fit one another, or where one is missing."""


def check_unconditional(sampler_name: str, unconditional: list | None) -> None:
    """Raise ValueError where a CFG++ sampler would get zeros in place of the unconditional prediction."""
    if "cfg_pp" in sampler_name and unconditional is None:
        raise ValueError(f"the sampler {sampler_name} needs an unconditional conditioning; connect `unconditional`")


def check_states(noise: Tensor, latent_image: Tensor, denoise_mask: Tensor | None) -> None:
    """Raise ValueError, naming the input, where what a run starts from is empty, NaN or infinite."""
    check_filled(latent_image, "`latent_image`")
    check_filled(noise, "`noise`")
    if denoise_mask is not None:
        check_filled(denoise_mask, "the mask of `latent_image`")


def check_sigmas(sigmas: Tensor) -> None:
    """Raise ValueError for noise levels that do not fall: a posterior is tracked on the way from noise to image."""
    levels = sigmas.tolist()
    if not all(0 <= level < math.inf for level in levels):
        raise ValueError("`sigmas` holds levels that are negative, NaN or infinite; take them from a scheduler node")
    for step, (level, following) in enumerate(pairwise(levels), start=1):
        if following > level:
            raise ValueError(
                f"`sigmas` must fall from step to step, but step {step} goes from {level:.4g} up to {following:.4g}. "
                "Dynamic Negative Guidance follows an image on its way out of noise: take the sigmas of a scheduler "
                "as they are, not flipped, and run only the parts that fall"
            )


@contextmanager
def shapes_explained(latent_image: Any) -> Iterator[None]:
    """Where a model fails on the shapes of what it is given, say which inputs these are: raise ValueError."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        raw = type(error) is not ValueError or "values to unpack" in str(error)
        if not raw or isinstance(error, comfy.model_management.OOM_EXCEPTION) or not ABOUT_SHAPES.search(str(error)):
            raise
        raise ValueError(
            f"the model cannot work with what it is given ({str(error).splitlines()[0]}): `latent_image`, which is "
            f"{shape_text(latent_image.shape)}, must be a latent for this model, and `positive`, `negative` and "
            "`unconditional` must be encoded with the CLIP that belongs to it; a mask or an area on them must fit the "
            "latent"
        ) from error


def check_conditioning(conditioning: list, name: str, positive: list | None = None, batch: int | None = None) -> None:
    """Raise ValueError, naming the input, where a conditioning is not finite or does not fit its neighbours."""
    widths = {c[0].shape[-1] for c in positive or [] if c[0] is not None}
    for embedding, options in conditioning:
        for extra in ("pooled_output", "mask"):
            if options.get(extra) is not None:
                check_filled(options[extra], f"the {extra} of the conditioning `{name}`")
        if embedding is None:
            continue
        if not bool(torch.isfinite(embedding).all()):
            raise ValueError(f"the conditioning `{name}` holds NaN or infinite values; encode the prompt again")
        if batch is not None and embedding.shape[0] not in (1, batch):
            raise ValueError(
                f"the conditioning `{name}` is a batch of {embedding.shape[0]}, the latent one of {batch}; use one "
                "prompt for all images or one for each"
            )
        if widths and embedding.shape[-1] not in widths:
            raise ValueError(
                f"the conditioning `{name}` is {embedding.shape[-1]} wide but `positive` {widths.pop()}: they come "
                "from text encoders of different model families; encode both with the CLIP that belongs to the model"
            )
