"""The judge: a small classifier that tells a picture's place, its time of day, and every thing in it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scenes import PLACES, THINGS, TIMES


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in n pictures: numbers of places and times, (n,), and what is there, (n, things) bool."""

    places: Tensor
    times: Tensor
    things: Tensor

    def shows(self, name: str) -> Tensor:
        """Whether each picture shows a place, a time or a thing, (n,) bool; ValueError for any other name."""
        if name in PLACES:
            return self.places == PLACES.index(name)
        if name in TIMES:
            return self.times == TIMES.index(name)
        if name in THINGS:
            return self.things[:, THINGS.index(name)]
        raise ValueError(f"{name!r} is none of {', '.join((*PLACES, *TIMES, *THINGS))}")


class Judge(nn.Module):
    """Four convolutions, then the mean and the maximum over the picture: pictures (n, 3, 64, 64) in -1 .. 1."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.width = width
        widths = (3, width, 2 * width, 4 * width, 5 * width)
        layers: list[nn.Module] = []
        for i, stride in enumerate((2, 2, 2, 1)):
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[i + 1]),
                nn.ReLU(inplace=True),
            ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * widths[-1], len(PLACES) + len(TIMES) + len(THINGS))

    def features(self, pictures: Tensor) -> Tensor:
        """(n, 3, 64, 64) -> (n, 10 width): each channel's mean, then each channel's maximum."""
        maps = self.body(pictures)
        return torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of places (n, places), times (n, times), and of each thing's being there (n, things)."""
        places, times, things = self.head(self.features(pictures)).split([len(PLACES), len(TIMES), len(THINGS)], 1)
        return places, times, things

    @torch.no_grad()
    def look(self, pictures: Tensor, batch: int = 500) -> Verdict:
        """What is most likely in each picture."""
        seen = [self(part) for part in pictures.split(batch)]
        places, times, things = (torch.cat(logits) for logits in zip(*seen, strict=True))
        return Verdict(places.argmax(dim=1), times.argmax(dim=1), things > 0)


def judge_loss(judge: nn.Module, pictures: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of place and time, and of all things; ``labels`` as ``Scene.labels`` has them, (n, 2 + things)."""
    places, times, things = judge(pictures)
    there = F.binary_cross_entropy_with_logits(things, labels[:, 2:].float(), reduction="none").sum(dim=1).mean()
    return F.cross_entropy(places, labels[:, 0]) + F.cross_entropy(times, labels[:, 1]) + there


def judge_accuracy(judge: Judge, pictures: Tensor, labels: Tensor) -> dict[str, float]:
    """The share of pictures, (n, 3, 64, 64) in -1 .. 1, on which the judge is right: place, time, and each thing."""
    found = judge.look(pictures)
    right: Sequence[tuple[str, Tensor]] = [
        ("place", found.places == labels[:, 0]),
        ("time", found.times == labels[:, 1]),
        *((name, found.things[:, i] == labels[:, 2 + i].bool()) for i, name in enumerate(THINGS)),
    ]
    return {name: float(each.float().mean()) for name, each in right}
