"""Where in the image, and when in the run, an undesired conditioning applies: areas, masks and timestep ranges."""

import math
from collections.abc import Sequence

import comfy.samplers
import comfy.utils
import torch
from torch import Tensor


def in_range(entry: dict, level: float) -> bool:
    """Whether a conditioning applies at a noise level, as ComfyUI decides it from its timestep range."""
    return entry.get("timestep_end", -math.inf) <= level <= entry.get("timestep_start", math.inf)


def check_regions(entries: Sequence[dict], name: str, latent_shape: Sequence[int]) -> None:
    """Raise ValueError, naming the conditioning, for areas and masks that do not fit a latent (batch, ...)."""
    batch, sizes = latent_shape[0], latent_shape[2:]
    for entry in entries:
        mask, area = entry.get("mask"), entry.get("area")
        if len(sizes) < 2 and (mask is not None or area is not None):
            raise ValueError(
                f"the conditioning {name} carries an area or a mask, but this latent has no height and width of its "
                "own (audio, or several latents packed into one); remove the area or the mask"
            )
        masks = len(mask) if mask is not None and mask.ndim > len(sizes) else 1
        if masks < batch and batch % masks:
            raise ValueError(
                f"the conditioning {name} carries {masks} masks for {batch} images; use one mask for all images, or "
                "one for each"
            )
        if area is not None and outside(in_elements(area, sizes), sizes):
            raise ValueError(
                f"the area of the conditioning {name} lies outside the latent, so that no part of the image uses it; "
                "move the area inside, or remove it"
            )


def in_elements(area: Sequence, sizes: Sequence[int]) -> list[int]:
    """The sizes, then the starts, of an area in the last dimensions of a latent, where it may be given as shares."""
    shares, numbers = area[0] == "percentage", [n for n in area if n != "percentage"]
    half = len(numbers) // 2
    used = sizes[-half:]
    if not shares:
        return [*numbers[: len(used)], *numbers[half : half + len(used)]]
    extents, starts = numbers[half - len(used) : half], numbers[2 * half - len(used) :]
    return [
        *(max(1, round(f * s)) for f, s in zip(extents, used, strict=True)),
        *(round(f * s) for f, s in zip(starts, used, strict=True)),
    ]


def used_sizes(area: Sequence | None, sizes: Sequence[int]) -> list[int]:
    """The height and width of what a model is shown of a latent, where a conditioning has this area, or none."""
    if area is None:
        return list(sizes)
    given = in_elements(area, sizes)
    half = len(given) // 2
    return [min(e, size - start) for e, start, size in zip(given[:half], given[half:], sizes[-half:], strict=True)]


def outside(area: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether an area begins beyond the end of a latent."""
    half = len(area) // 2
    return any(start >= size for start, size in zip(area[half:], sizes[-half:], strict=True))


def area_to_mask(entry: dict, latent_shape: Sequence[int]) -> dict:
    """An entry whose area has become a mask: ComfyUI would copy an area to the sampler's own conditionings."""
    entry = {**entry, "set_area_to_bounds": False}
    area = entry.pop("area", None)
    if area is None:
        return entry
    sizes = list(latent_shape[2:])
    mask = inside(in_elements(area, sizes), torch.zeros(1, *sizes)).float()
    if "mask" in entry:
        given = entry["mask"]
        masks = len(given) if given.ndim > len(sizes) else 1
        mask = mask * comfy.utils.reshape_mask(given, (masks, 1, *sizes))[:, 0].to(mask)
    return {**entry, "mask": mask}


def where_covered(negative: Tensor, reference: Tensor, entries: list[dict]) -> Tensor:
    """``negative`` where an entry reaches with some strength; elsewhere, where ComfyUI leaves zeros, the reference."""
    covered = torch.zeros_like(negative, dtype=torch.bool)
    for entry in entries:
        if entry.get("strength", 1.0) == 0 or ("mask" in entry and entry.get("mask_strength", 1.0) == 0):
            continue
        if "mask" not in entry and "area" not in entry:
            return negative
        reached = torch.ones_like(covered)
        if "mask" in entry:  # dealt out to the images as ComfyUI does it
            masks = entry["mask"][: len(negative)]
            reached = (masks > 0).repeat(len(negative) // len(masks), *[1] * (masks.ndim - 1)).unsqueeze(1)
        if "area" in entry:  # ComfyUI adds entries for the areas of the sampler's own conditionings
            area = comfy.samplers.add_area_dims(list(entry["area"]), negative.ndim - 2)
            reached = reached & inside(area, negative)
        covered = covered | reached
    return torch.where(covered, negative, reference)


def inside(area: Sequence[int], like: Tensor) -> Tensor:
    """True inside an area (sizes, then starts, of the last dimensions), False elsewhere; of the shape of ``like``."""
    dims = len(area) // 2
    whole = part = torch.zeros_like(like, dtype=torch.bool)
    for i in range(dims):
        dim = like.ndim - dims + i
        size = min(area[i], like.shape[dim] - area[dims + i])
        part = part.narrow(dim, area[dims + i], size)
    part.fill_(True)
    return whole
