"""The matrix as a heat map: what is left, the balance of the rest and the distance, by sampler and scheduler."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..plots.drawing import FAINT, INK
from .sampler_matrix import Row, cells_of, columns_of, percent

GOOD, AIM, BAD = (49, 104, 173), (245, 245, 245), (196, 84, 18)
"""Blue, grey-white and orange, which colour-blind readers can tell apart, also in print."""
CELL_WIDTH, CELL_HEIGHT, LABEL_WIDTH, GAP = 58, 24, 250, 36
TITLE_HEIGHT, HEAD_HEIGHT, FOOT_HEIGHT = 70, 150, 54


@dataclass(frozen=True)
class Panel:
    """One measure: its title, how a cell's row gives it, and the values that are best, aimed at, and worst."""

    title: str
    value: Callable[[Row], float | None]
    text: Callable[[float], str]
    best: float
    aim: float
    worst: float


PANELS = (
    Panel("left, % (aim: at most 4)", lambda row: row["left"], percent, 0.0, 0.04, 0.12),
    Panel("KL of the rest (aim: at most 0.03)", lambda row: row["KL of the rest"], "{:.3f}".format, 0.0, 0.03, 0.15),
    Panel(
        "distance, % off unguided (aim: 5)",
        lambda row: None if row["distance ratio"] is None else abs(row["distance ratio"] - 1),
        percent,
        0.0,
        0.05,
        0.25,
    ),
)


def heat_map(rows: Sequence[Row], node: str, title: str) -> Image.Image:
    """One panel per measure, one row per sampler, one column per scheduler and step count."""
    columns, cells = columns_of(rows), cells_of(rows, node)
    panel_width = max(len(columns) * CELL_WIDTH, 300)
    width = LABEL_WIDTH + len(PANELS) * (panel_width + GAP)
    height = TITLE_HEIGHT + HEAD_HEIGHT + len(cells) * CELL_HEIGHT + FOOT_HEIGHT
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    large, font, small = (ImageFont.load_default(size) for size in (22, 17, 15))

    draw.text((14, 14), title, fill=INK, font=large)
    top = TITLE_HEIGHT + HEAD_HEIGHT
    for i, sampler in enumerate(cells):
        middle = top + (i + 0.5) * CELL_HEIGHT
        draw.text((LABEL_WIDTH - 10, middle), sampler, fill=INK, font=small, anchor="rm")

    for p, panel in enumerate(PANELS):
        left = LABEL_WIDTH + p * (panel_width + GAP)
        draw.text((left, TITLE_HEIGHT), panel.title, fill=INK, font=font)
        for j, (scheduler, steps) in enumerate(columns):
            head = _slanted(f"{scheduler} {steps}", small)
            picture.paste(head, (left + j * CELL_WIDTH + 18, top - head.height - 4), head)
        for i, of_sampler in enumerate(cells.values()):
            for j, column in enumerate(columns):
                box = (left + j * CELL_WIDTH, top + i * CELL_HEIGHT)
                _cell(draw, box, panel, of_sampler.get(column), small)
        _key(draw, (left, height - FOOT_HEIGHT + 18), panel, small)
    return picture


def _cell(draw: ImageDraw.ImageDraw, at: tuple[float, float], panel: Panel, row: Row | None, font: Any) -> None:
    box = (at[0], at[1], at[0] + CELL_WIDTH - 2, at[1] + CELL_HEIGHT - 2)
    value = None if row is None else panel.value(row)
    centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    if value is None:
        draw.rectangle(box, outline=FAINT)
        draw.text(centre, "" if row is None else "-", fill=INK, font=font, anchor="mm")
        return
    colour = _colour(panel, value)
    draw.rectangle(box, fill=colour)
    dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 140
    draw.text(centre, panel.text(value), fill="white" if dark else INK, font=font, anchor="mm")


def _colour(panel: Panel, value: float) -> tuple[int, int, int]:
    """From blue (best) over grey-white (the aim) to orange (worst)."""
    if value <= panel.aim:
        share, end = (panel.aim - value) / (panel.aim - panel.best), GOOD
    else:
        share, end = min(1.0, (value - panel.aim) / (panel.worst - panel.aim)), BAD
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(AIM, end, strict=True))
    return red, green, blue


def _key(draw: ImageDraw.ImageDraw, at: tuple[float, float], panel: Panel, font: Any) -> None:
    """The colours of a panel with the values that they stand for."""
    x = at[0]
    for value, note in ((panel.best, ""), (panel.aim, " aim"), (panel.worst, " and more")):
        draw.rectangle((x, at[1], x + 26, at[1] + 16), fill=_colour(panel, value), outline=FAINT)
        text = panel.text(value) + note
        draw.text((x + 32, at[1] + 8), text, fill=INK, font=font, anchor="lm")
        x += 32 + draw.textlength(text, font=font) + 18


def _slanted(text: str, font: Any) -> Image.Image:
    """A column's head, turned by 60 degrees, as a mask-like picture in ink on nothing."""
    length = int(font.getlength(text)) + 4
    flat = Image.new("RGBA", (length, 22), (0, 0, 0, 0))
    ImageDraw.Draw(flat).text((2, 11), text, fill=(*INK, 255), font=font, anchor="lm")
    return flat.rotate(60, expand=True, resample=Image.Resampling.BICUBIC)
