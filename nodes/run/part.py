"""Whether a model may be asked for a part of a batch."""

from typing import Any

from comfy.patcher_extension import WrappersMP
from torch import Tensor

AROUND_THE_MODEL = (WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
"""Where others wrap an evaluation. They may keep something for each image of the batch, as EasyCache does."""

FRAMES = "num_video_frames"
"""What models such as Stable Video Diffusion are told: there the images of the batch are the frames of one video."""


def divisible(args: dict[str, Any], entries: list[dict[str, Any]]) -> bool:
    """Whether the undesired ``entries`` of a call may be evaluated for some images of its batch alone.

    Not where something gives each image its own (a mask, an image input, a ControlNet), nor where a patch or the
    model itself may let the images see one another.
    """
    state, options = args["input"], args["model_options"]
    transformer = options.get("transformer_options", {})
    wrappers = transformer.get("wrappers", {})
    wrapped = [functions for kind in AROUND_THE_MODEL for functions in wrappers.get(kind, {}).values() if functions]
    injected = getattr(getattr(args["model"], "current_patcher", None), "injections", None)  # as AnimateDiff is
    if transformer.get("patches") or transformer.get("patches_replace") or wrapped or injected:
        return False
    if options.get("model_function_wrapper") or options.get("context_handler") or len(args["sigma"]) != len(state):
        return False
    return all(_alike(entry, state.ndim) for entry in entries)


def _alike(entry: dict[str, Any], dims: int) -> bool:
    """Whether a conditioning says the same of every image."""
    if any(entry.get(name) is not None for name in ("control", "hooks", "gligen")):
        return False
    mask, said = entry.get("mask"), entry.get("model_conds", {})
    if mask is not None and mask.ndim > dims - 2 and len(mask) > 1:
        return False
    return FRAMES not in said and all(_one(getattr(cond, "cond", None)) for cond in said.values())


def _one(value: Any) -> bool:
    """Whether what a model is told has one row for all images, or none."""
    if isinstance(value, Tensor):
        return value.ndim == 0 or len(value) == 1
    return all(map(_one, value)) if isinstance(value, list | tuple) else True
