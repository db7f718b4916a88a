"""The noise frame and the training chain of a ComfyUI model."""

from typing import Any

import comfy.model_sampling
import torch

from ...dng_core.frames import NoiseFrame
from ...dng_core.schedules import DDPMSchedule

TRAINING_STEPS = 1000
"""The length of the training chains that offsets are tuned on (Ho et al. 2020)."""


def noise_frame(model_sampling: Any) -> NoiseFrame:
    """The frame of a model's states; ValueError for a model that follows no noise schedule."""
    kinds = (comfy.model_sampling.IMG_TO_IMG, comfy.model_sampling.IMG_TO_IMG_FLOW)
    if isinstance(model_sampling, kinds):
        raise ValueError(
            "image-to-image models (such as Lotus) follow no noise schedule that Dynamic Negative Guidance can track"
        )
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        return NoiseFrame("flow", float(getattr(model_sampling, "noise_scale", 1.0)))
    return NoiseFrame("ve")


def sigma_at(model_sampling: Any, share: float) -> float:
    """The noise level (sigma) at which a share of the model's schedule is done, as ComfyUI counts it."""
    return noise_frame(model_sampling).sigma(float(model_sampling.percent_to_sigma(share)))


def training_chain(model_sampling: Any) -> DDPMSchedule:
    """The model's own discrete chain; DDPM's linear one, as a function of sigma, for models that have none.

    Offsets are tuned on chains of 1000 steps: a thinned (LCM, 50) or a finer one (Stable Cascade, 10,000) is none.
    """
    discrete = isinstance(model_sampling, comfy.model_sampling.ModelSamplingDiscrete)
    flow = isinstance(model_sampling, comfy.model_sampling.CONST)
    if not discrete or flow or len(model_sampling.sigmas) != TRAINING_STEPS:
        return DDPMSchedule.named("linear")
    alpha_bars = 1 / (model_sampling.sigmas.cpu().double() ** 2 + 1)
    betas = 1 - alpha_bars / torch.cat([alpha_bars.new_ones(1), alpha_bars[:-1]])
    return DDPMSchedule(betas)
