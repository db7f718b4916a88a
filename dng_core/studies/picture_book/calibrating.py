"""The calibration of a picture book: on the places of its scenes, of which each picture shows exactly one."""

from collections.abc import Callable

import torch

from ...calibration import Evidence, calibrate, evidence_of
from ...calibration_files import ModelCalibration
from ...guidance import NegativeGuidance
from ...models.picture_book.prompting import contexts, denoised
from ...models.picture_book.scenes import PLACES
from ...models.picture_book.weights import FULL_NAME, SHIPPED_PICTURE_BOOK, load_picture_book
from ...posterior import Chain
from ...schedules import DDPMSchedule, ddpm_sigmas
from ...settings import Settings
from ..calibrating import joined
from ..class_removal import starting_noise
from .sampling import LATENT, sample

BATCH = 16  # pictures drawn at once: a choice


@torch.no_grad()
def calibrated_book(images: int, steps: int, seed: int, progress: Callable[[int], object]) -> ModelCalibration:
    """The calibration of the shipped picture book, by ``euler_ancestral`` and the empty prompt at cfg 1.

    ``progress`` is told how many pictures were drawn, batch by batch. ValueError for too few pictures or steps.
    """
    book, info = load_picture_book(SHIPPED_PICTURE_BOOK)
    chain = DDPMSchedule.named(info.schedule)
    levels, texts = ddpm_sigmas(chain, steps), contexts(book, ["", *PLACES]).split(1)
    found: list[list[Evidence]] = []
    for start in range(0, images, BATCH):
        size = min(BATCH, images - start)
        settings = Settings(prior=0.5 / len(PLACES), guidance_scale=0.0)
        guidance = NegativeGuidance([settings] * len(PLACES), Chain(levels))

        def denoise(x: torch.Tensor, sigma: float, guidance: NegativeGuidance = guidance) -> torch.Tensor:
            reference, *places = denoised(book, chain, x, sigma, list(texts))
            return guidance(x, sigma, reference, reference, places)

        noise, generator = starting_noise(start, size, seed, LATENT)
        sample(denoise, noise, levels, "euler_ancestral", generator)
        found.append(evidence_of(guidance))
        progress(size)
    return ModelCalibration(calibrate(joined(found)), FULL_NAME, LATENT)
