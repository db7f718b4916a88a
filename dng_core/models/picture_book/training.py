"""Training of the picture book on an endless row of scenes, which are drawn as they are needed."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..mnist import to_model_range
from ..training import DenoisingError, TrainingResult, normal, optimise, uniform
from ..training_config import TrainingConfig
from .judge import Judge, judge_loss
from .networks import CrossUNetConfig, PictureBook, TextConfig, fold
from .pictures import pages
from .words import LENGTH, TOKENS, tokens

EPOCH = 100_000  # scenes that count as an epoch; a choice
TEXT = TextConfig(TOKENS, LENGTH)
JUDGE_NOISE = 0.2  # of the judge's pictures, at most; pixels are -1 to 1; a choice


def train_picture_book(
    unet: CrossUNetConfig,
    config: TrainingConfig,
    checkpoint: Path,
    device: torch.device,
    initial: Mapping[str, Tensor] | None = None,
    epoch: int = EPOCH,
) -> TrainingResult:
    """Train text encoder and U-Net by the squared error of v; ``null_label_share`` of the captions are left out.

    The i-th scene of a step is number step * batch_size + i of the seed ``config.seed``, so that no scene is seen
    twice, and a resumed run sees the same. ``initial``: weights to start from, in place of random ones.
    """
    torch.manual_seed(config.seed)
    model = PictureBook(TEXT, unet)
    error = DenoisingError("v", config, device)
    identity = f"picture book {TEXT} {unet} on scenes"
    nothing = torch.tensor(tokens([]), device=device)

    def loss(model: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        pictures, words, _ = pages(index.tolist(), config.seed)

        def predict(x_t: Tensor, timestep: Tensor) -> Tensor:
            dropped = uniform((len(words),), generator) < config.null_label_share
            said = torch.where(dropped[:, None], nothing, words.to(device))
            return model(x_t, timestep, said)

        return error(fold(to_model_range(pictures)).to(device), predict, generator)

    return optimise(model, loss, epoch, config, checkpoint, device, identity, initial, endless=True)


def train_judge(
    width: int,
    config: TrainingConfig,
    checkpoint: Path,
    device: torch.device,
    initial: Mapping[str, Tensor] | None = None,
    epoch: int = EPOCH,
) -> TrainingResult:
    """Train the judge on the scenes of ``config.seed``; ``initial`` is as in :func:`train_picture_book`.

    Each picture gets Gaussian noise of a random size, so that noise left in generated pictures decides nothing.
    """
    torch.manual_seed(config.seed)
    model = Judge(width)

    def loss(model: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        pictures, _, labels = pages(index.tolist(), config.seed)
        size = JUDGE_NOISE * uniform((len(pictures), 1, 1, 1), generator)
        noisy = to_model_range(pictures).to(device) + size * normal(pictures.shape, generator)
        return judge_loss(model, noisy, labels.to(device))

    return optimise(model, loss, epoch, config, checkpoint, device, f"judge {width} on scenes", initial, endless=True)
