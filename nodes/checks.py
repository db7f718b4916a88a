"""What is checked of the inputs of nodes: ComfyUI checks what is typed into widgets, but nothing that is linked."""

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor


def check_values(node: type[io.ComfyNode], **values: Any) -> None:
    """Raise ValueError, naming the input, where a number or a choice is not one that the node's schema offers."""
    offered = {given.id: given for given in node.define_schema().inputs}
    for name, value in values.items():
        given = offered[name]
        if isinstance(given, io.Combo.Input):
            if value not in given.options:
                raise ValueError(f"`{name}` must be one of {', '.join(given.options)}; it is {value!r}")
        elif not given.min <= value <= given.max:  # NaN is not within them either
            raise ValueError(f"`{name}` must be at least {given.min:g} and at most {given.max:g}; it is {value:g}")


def check_images(images: Tensor, name: str) -> None:
    """Raise ValueError, naming the input, for what is no batch of finite images in colour."""
    if images.ndim != 4 or images.shape[-1] < 3:
        raise ValueError(
            f"`{name}` is {shape_text(images.shape)}, not a batch of images in colour (images x height x width x 3); "
            "connect an IMAGE, such as that of VAE Decode"
        )
    check_filled(images, f"`{name}`")


def check_latent(latent: dict[str, Any], name: str) -> None:
    """Raise ValueError, naming the input, where a LATENT or its mask is empty, NaN or infinite."""
    check_filled(latent["samples"], f"`{name}`")
    if latent.get("noise_mask") is not None:
        check_filled(latent["noise_mask"], f"the mask of `{name}`")


def check_filled(values: Any, name: str) -> None:
    """Raise ValueError, naming them, for values of which there are none, or which are not finite.

    ``values`` is a tensor, or several packed into one. Waits for the device.
    """
    for part in values.unbind() if values.is_nested else [values]:
        if not part.numel():
            raise ValueError(f"{name} is empty (its shape is {shape_text(part.shape)}); connect at least one image")
        if not bool(torch.isfinite(part).all()):
            raise ValueError(
                f"{name} holds NaN or infinite values, so that what made it failed; run that model or VAE in bfloat16 "
                "or float32"
            )


def shape_text(shape: Any) -> str:
    """A shape as text, such as 1x4x64x64."""
    return "x".join(str(n) for n in shape)
