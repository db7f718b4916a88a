"""What the picture book draws by itself: whether pictures show what was asked, and the rest as often as scenes do."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...models.picture_book.judge import Verdict
from ...models.picture_book.pictures import page
from ...models.picture_book.prompting import contexts
from ...models.picture_book.scenes import PLACES, THINGS, TIMES
from ...models.picture_book.shares import shares_given
from ...models.picture_book.words import split
from ...plots.drawing import Drawing
from ...schedules import ddpm_sigmas
from ..class_removal import starting_noise
from ..samplers import sample
from .opened import open_book
from .sampling import LATENT, pictures_of, prompted

CFGS = (1.0, 3.0)
BATCH = 64  # pictures drawn at once; like the numbers below, a choice
CAPTIONS = 1_000_000  # the seed's row of scenes from which the captions are, so that no training saw them
COLUMNS, ROWS, SIDE, LINES = 8, 5, 128, 4  # of the sheet, and its captions' lines


def picture_book_figure(
    weights: Path | None, sheet: Path, images: int, steps: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Rows for every label at each cfg, from pictures under captions of new scenes, which the judge looks at.

    *shown*: percent of the pictures whose caption names it that show it. *drawn*: percent of the others that show it;
    *expected*: the exact share of these scenes. At cfg 1, drawn and expected should agree. The first pictures of the
    last cfg are drawn to ``sheet``.
    """
    opened = open_book(weights)
    book, chain = opened.book, opened.chain
    captions = [page(i, CAPTIONS + seed)[2] for i in range(images)]
    for cfg in CFGS:
        parts = []
        for start in range(0, images, BATCH):
            texts = contexts(book, captions[start : start + BATCH])
            noise, generator = starting_noise(start, len(texts), seed, LATENT)
            denoise = prompted(book, chain, texts, contexts(book, [""]), cfg)
            parts.append(pictures_of(sample(denoise, noise, ddpm_sigmas(chain, steps), "euler_ancestral", generator)))
        pictures = torch.cat(parts)
        for row in label_rows(captions, opened.judge.look(pictures)):
            yield {"cfg": cfg} | row
    caption_sheet(pictures[: COLUMNS * ROWS], captions).save(sheet)


def label_rows(captions: Sequence[str], verdict: Verdict) -> Iterator[dict[str, Any]]:
    """A row for place, time, all things together, and every thing; percent."""
    words = [set(split(caption)) for caption in captions]
    shares = [shares_given(said) for said in words]
    seen = {name: verdict.shows(name).tolist() for name in (*PLACES, *TIMES, *THINGS)}
    for of, names in (("place", PLACES), ("time", TIMES), ("things", THINGS), *((name, (name,)) for name in THINGS)):
        asked = [seen[name][i] for i, said in enumerate(words) for name in names if name in said]
        others = [(i, name) for i, said in enumerate(words) for name in names if name not in said]
        drawn = percent([seen[name][i] for i, name in others])
        expected = percent([shares[i][name] for i, name in others])
        compared = of not in ("place", "time")
        yield {
            "of": of,
            "asked": len(asked),
            "shown, %": percent(asked),
            "not asked": len(others) if compared else None,
            "expected, %": expected if compared else None,
            "drawn, %": drawn if compared else None,
        }


def percent(values: Sequence[float]) -> float | None:
    """100 times the mean; None for no values."""
    return 100 * sum(values) / len(values) if values else None


def caption_sheet(pictures: Tensor, captions: Sequence[str]) -> Image.Image:
    """Pictures, (n, 3, 64, 64) in -1 .. 1, enlarged, each above its caption."""
    gap, size = 10, 11
    cell = SIDE + LINES * (size + 2) + gap
    rows = -(-len(pictures) // COLUMNS)
    drawing = Drawing(COLUMNS * (SIDE + gap) + gap, rows * cell + gap)
    pixels = ((pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for i, (picture, caption) in enumerate(zip(pixels, captions, strict=False)):
        left, top = gap + i % COLUMNS * (SIDE + gap), gap + i // COLUMNS * cell
        enlarged = Image.fromarray(np.ascontiguousarray(picture)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        drawing.picture(enlarged, left, top)
        for n, line in enumerate(textwrap.wrap(caption or "(no caption)", 24)[:LINES]):
            drawing.text((left, top + SIDE + 3 + n * (size + 2)), line, size)
    return drawing.finished()
