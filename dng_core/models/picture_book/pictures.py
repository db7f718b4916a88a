"""The picture book's data: an endless row of scenes, each known by its number and drawn when it is asked for."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from .drawing import draw
from .scenes import Scene, caption, random_scene
from .words import split, tokens


def page(number: int, seed: int) -> tuple[Scene, np.ndarray, str]:
    """Scene ``number`` of a seed's row, its picture, uint8 (64, 64, 3), and its caption."""
    generator = np.random.default_rng((seed, number))
    scene = random_scene(generator)
    return scene, draw(scene, generator), caption(scene, generator)


def pages(numbers: Iterable[int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, uint8 (n, 3, 64, 64), their captions' tokens, (n, LENGTH), and labels, (n, 2 + things) long."""
    drawn = [page(int(number), seed) for number in numbers]
    pictures = torch.from_numpy(np.stack([picture for _, picture, _ in drawn])).permute(0, 3, 1, 2).contiguous()
    words = torch.tensor([tokens(split(said)) for _, _, said in drawn])
    return pictures, words, torch.from_numpy(np.stack([scene.labels() for scene, _, _ in drawn]))
