"""The matrix as a heat map: what is left, the balance of the rest and the distance, by sampler and scheduler."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from ...plots.drawing import Colour, Drawing, Position, text_width
from .kept import Row
from .sampler_matrix import cells_of, columns_of, percent

GOOD, AIM, BAD = (49, 104, 173), (245, 245, 245), (196, 84, 18)
"""Blue, grey-white and orange, which colour-blind readers can tell apart, also in print."""
CELL_WIDTH, CELL_HEIGHT, LABEL_WIDTH, GAP, PANEL_WIDTH = 58, 24, 250, 36, 340
TITLE_HEIGHT, HEAD_HEIGHT, FOOT_HEIGHT = 70, 160, 54


@dataclass(frozen=True)
class Panel:
    """One measure: its title, its value in a row, its text, and the best value, the aim and the worst value."""

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
    panel_width = max(len(columns) * CELL_WIDTH, PANEL_WIDTH)
    top = TITLE_HEIGHT + HEAD_HEIGHT
    bottom = top + len(cells) * CELL_HEIGHT
    drawing = Drawing(LABEL_WIDTH + len(PANELS) * (panel_width + GAP), bottom + FOOT_HEIGHT)

    drawing.text((14, 14), title, 22)
    for i, sampler in enumerate(cells):
        drawing.text((LABEL_WIDTH - 10, top + (i + 0.5) * CELL_HEIGHT), sampler, 15, anchor="rm")
    for p, panel in enumerate(PANELS):
        left = LABEL_WIDTH + p * (panel_width + GAP)
        drawing.text((left, TITLE_HEIGHT - 10), panel.title, 17)
        for j, column in enumerate(columns):
            head = _upright(" ".join(map(str, column)), 15)
            drawing.picture(head, left + j * CELL_WIDTH + (CELL_WIDTH - head.width) // 2, top - head.height - 4)
            for i, of_sampler in enumerate(cells.values()):
                _cell(drawing, (left + j * CELL_WIDTH, top + i * CELL_HEIGHT), panel, of_sampler.get(column))
        _key(drawing, (left, bottom + 18), panel)
    return drawing.finished()


def _cell(drawing: Drawing, at: Position, panel: Panel, row: Row | None) -> None:
    value = None if row is None else panel.value(row)
    centre = (at[0] + CELL_WIDTH / 2 - 1, at[1] + CELL_HEIGHT / 2 - 1)
    if value is None:
        drawing.text(centre, "" if row is None else "-", 15, drawing.theme.muted, anchor="mm")
        return
    colour = _colour(panel, value)
    drawing.rectangle((at[0], at[1], at[0] + CELL_WIDTH - 2, at[1] + CELL_HEIGHT - 2), colour)
    dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 140
    ink = drawing.theme.background if dark else drawing.theme.ink
    drawing.text(centre, panel.text(value), 15, ink, anchor="mm")


def _colour(panel: Panel, value: float) -> Colour:
    """From blue (best) over grey-white (the aim) to orange (worst)."""
    if value <= panel.aim:
        share, end = (panel.aim - value) / (panel.aim - panel.best), GOOD
    else:
        share, end = min(1.0, (value - panel.aim) / (panel.worst - panel.aim)), BAD
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(AIM, end, strict=True))
    return red, green, blue


def _key(drawing: Drawing, at: Position, panel: Panel) -> None:
    """The colours of a panel with the values that they stand for."""
    x, y = at
    for value, note in ((panel.best, ""), (panel.aim, " aim"), (panel.worst, " and more")):
        drawing.rectangle((x, y, x + 26, y + 16), drawing.theme.faint)
        drawing.rectangle((x + 1, y + 1, x + 25, y + 15), _colour(panel, value))
        text = panel.text(value) + note
        drawing.text((x + 32, y + 8), text, 15, anchor="lm")
        x += 32 + text_width(text, 15) + 18


def _upright(text: str, size: int) -> Image.Image:
    """A column's head, read from below."""
    head = Drawing(int(text_width(text, size)) + 4, size + 6)
    head.text((2, (size + 6) / 2), text, size, anchor="lm")
    return head.finished().rotate(90, expand=True)
