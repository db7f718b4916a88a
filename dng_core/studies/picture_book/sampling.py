"""What a sampler of the picture book needs: its latent's shape, the prediction under a prompt, and its pictures."""

from torch import Tensor

from ...models.picture_book.networks import PictureBook, unfold
from ...models.picture_book.prompting import denoised
from ...schedules import DDPMSchedule
from ..samplers import Denoiser

LATENT = (48, 16, 16)


def prompted(book: PictureBook, chain: DDPMSchedule, text: Tensor, empty: Tensor, cfg: float) -> Denoiser:
    """Classifier-free guidance alone, D_u + cfg (D_p - D_u); ``text`` and ``empty`` as ``denoised`` takes them."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        if cfg == 1:
            return denoised(book, chain, x, sigma, [text])[0]
        positive, unconditional = denoised(book, chain, x, sigma, [text, empty])
        return unconditional + cfg * (positive - unconditional)

    return denoise


def pictures_of(latents: Tensor) -> Tensor:
    """Pictures in -1 .. 1, (n, 3, 64, 64), of latents."""
    return unfold(latents).clamp(-1, 1)
