"""The calibration of a picture book: on the places of its scenes, of which each picture shows exactly one."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...calibration import calibrate
from ...calibration_files import ModelCalibration
from ...models.picture_book.prompting import contexts, denoised
from ...models.picture_book.scenes import PLACES
from ...models.picture_book.weights import FULL_NAME, SHIPPED_PICTURE_BOOK, load_picture_book
from ...schedules import DDPMSchedule, ddpm_sigmas
from ..calibrating import observed
from .sampling import LATENT

BATCH = 16  # pictures drawn at once: a choice


@torch.no_grad()
def calibrated_book(images: int, steps: int, seed: int, progress: Callable[[int], object]) -> ModelCalibration:
    """The calibration of the shipped picture book, by ``euler_ancestral`` and the empty prompt at cfg 1.

    ``progress`` is told how many pictures were drawn, batch by batch. ValueError for too few pictures or steps.
    """
    book, info = load_picture_book(SHIPPED_PICTURE_BOOK)
    chain = DDPMSchedule.named(info.schedule)
    texts = contexts(book, ["", *PLACES]).split(1)

    def predict(x: Tensor, sigma: float) -> tuple[Tensor, list[Tensor]]:
        reference, *places = denoised(book, chain, x, sigma, list(texts))
        return reference, places

    levels = ddpm_sigmas(chain, steps)  # ddpm_sample's steps over them are those of euler_ancestral
    evidence, _ = observed(predict, len(PLACES), LATENT, levels, images, seed, progress, BATCH)
    return ModelCalibration(calibrate(evidence), FULL_NAME, LATENT)
