"""The picture book's predictions under prompts, for samplers that work with denoised estimates."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...schedules import DDPMSchedule
from ..predictors import dtype_of, estimate
from .networks import PictureBook
from .words import split, tokens


@torch.no_grad()
def contexts(book: PictureBook, prompts: Sequence[str]) -> Tensor:
    """The contexts of prompts, (prompts, tokens, width); ValueError for words that the book does not know."""
    device = book.text.positions.device
    return book.text(torch.tensor([tokens(split(prompt)) for prompt in prompts], device=device))


@torch.no_grad()
def denoised(book: PictureBook, chain: DDPMSchedule, x: Tensor, sigma: float, texts: Sequence[Tensor]) -> list[Tensor]:
    """The denoised estimates of VE states x, (n, 48, height, width), under each of several texts, in one batch.

    ``texts``: contexts, (1, tokens, width), or (n, tokens, width) with one for each state. Each estimate is clamped to
    -1 .. 1, the range of pictures.
    """
    n = len(x)
    context = torch.cat([text.expand(n, -1, -1) for text in texts])

    def predict(x_t: Tensor, timestep: Tensor) -> Tensor:
        return book.unet(x_t.to(dtype_of(book.unet)), timestep, context)

    return list(estimate(predict, "v", chain, x.repeat(len(texts), 1, 1, 1), sigma).split(n))
