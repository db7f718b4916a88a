"""What every picture is drawn with: themes, smooth shapes, text, ticks."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Position = tuple[float, float]
Box = tuple[float, float, float, float]
ThemeName = Literal["light", "dark"]

OVERSAMPLING = 3  # shapes are drawn this much larger and then reduced: Pillow's own lines have ragged edges


@dataclass(frozen=True)
class Theme:
    """Colours. Colour-blind readers can tell ``series`` apart; ``ramp`` runs from no change to the largest."""

    background: Colour
    ink: Colour
    muted: Colour
    faint: Colour
    alarm: Colour
    series: tuple[Colour, ...]
    ramp: tuple[Colour, ...]


# Okabe and Ito's palette, in shades that keep their contrast on the background
THEMES: dict[ThemeName, Theme] = {
    "light": Theme(
        background=(255, 255, 255),
        ink=(38, 38, 38),
        muted=(105, 105, 105),
        faint=(222, 222, 222),
        alarm=(214, 39, 40),
        series=(
            (0, 114, 178),
            (213, 94, 0),
            (0, 158, 115),
            (204, 121, 167),
            (230, 159, 0),
            (86, 180, 233),
            (90, 90, 90),
            (150, 110, 30),
        ),
        ramp=((248, 248, 248), (254, 200, 110), (228, 80, 40), (130, 0, 50), (50, 0, 40)),
    ),
    "dark": Theme(
        background=(26, 27, 30),
        ink=(232, 232, 232),
        muted=(165, 165, 168),
        faint=(62, 64, 70),
        alarm=(255, 92, 92),
        series=(
            (86, 180, 233),
            (240, 130, 60),
            (38, 194, 148),
            (224, 150, 192),
            (240, 190, 70),
            (130, 150, 255),
            (200, 200, 200),
            (240, 228, 120),
        ),
        ramp=((18, 18, 20), (90, 20, 110), (200, 60, 80), (250, 150, 40), (252, 250, 180)),
    ),
}


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, which has ASCII letters and few others: no Greek."""
    return ImageFont.load_default(size)


class Drawing:
    """A picture in the making. Coordinates are the finished picture's pixels; text and pictures lie above shapes."""

    def __init__(self, width: int, height: int, theme: ThemeName = "light") -> None:
        self.theme = THEMES[theme]
        self.width, self.height = width, height
        large = (width * OVERSAMPLING, height * OVERSAMPLING)
        self._shapes = Image.new("RGB", large, self.theme.background)
        self._draw = ImageDraw.Draw(self._shapes, "RGBA")
        self._texts: list[tuple[Position, str, int, Colour, str]] = []
        self._pictures: list[tuple[Image.Image, tuple[int, int]]] = []

    def line(self, points: Sequence[Position], colour: Colour, width: float = 1.0, dash: float | None = None) -> None:
        """A line through ``points``; ``dash``: the length of its dashes and gaps, None for a solid one."""
        thick = max(1, round(width * OVERSAMPLING))
        for part in [points] if dash is None else _dashes(points, dash):
            self._draw.line(_enlarged(part), fill=colour, width=thick, joint="curve")

    def dot(self, point: Position, radius: float, colour: Colour) -> None:
        (x, y) = point
        self._draw.ellipse(_enlarged([(x - radius, y - radius), (x + radius, y + radius)]), fill=colour)

    def area(self, points: Sequence[Position], colour: Colour, opacity: float = 1.0) -> None:
        self._draw.polygon(_enlarged(points), fill=(*colour, round(255 * opacity)))

    def rectangle(self, box: Box, colour: Colour) -> None:
        """Filled, up to but not including the right and lower edge."""
        left, top, right, bottom = (round(v * OVERSAMPLING) for v in box)
        if right > left and bottom > top:
            self._draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)

    def text(self, at: Position, text: str, size: int, colour: Colour | None = None, anchor: str = "la") -> None:
        self._texts.append((at, text, size, colour or self.theme.ink, anchor))

    def picture(self, picture: Image.Image, left: int, top: int) -> None:
        self._pictures.append((picture, (left, top)))

    def finished(self) -> Image.Image:
        picture = self._shapes.reduce(OVERSAMPLING)
        for inner, corner in self._pictures:
            picture.paste(inner, corner)
        draw = ImageDraw.Draw(picture)
        for at, text, size, colour, anchor in self._texts:
            draw.text(at, text, fill=colour, font=font(size), anchor=anchor)
        return picture


def text_width(text: str, size: int) -> float:
    return font(size).getlength(text)


def fitted(text: str, size: int, width: float) -> str:
    """``text``, cut short with an ellipsis where it is wider than ``width``."""
    while text_width(text, size) > width and len(text) > 1:
        text = text[:-2] + "…"
    return text


def ticks(low: float, high: float, at_most: int) -> list[float]:
    """At most ``at_most`` round numbers within low .. high, spaced by 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / at_most))
    step = next(s * power for s in (1, 2, 5, 10, 20) if span / (s * power) <= at_most - 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [min(max(i * step, low), high) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, at_most: int) -> list[float]:
    """At most ``at_most`` round numbers within low .. high, for a logarithmic axis; 0 < low <= high."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [d * 10.0**e for e in decades for d in digits if low * 0.999 <= d * 10.0**e <= high * 1.001]
        if 1 < len(found) <= at_most:
            return found
    whole = [10.0**e for e in decades if low * 0.999 <= 10.0**e <= high * 1.001]
    if whole:
        return whole[:: math.ceil(len(whole) / at_most)]
    return ticks(low, high, at_most)


def ramp_colour(theme: Theme, value: float) -> Colour:
    """The colour of a value in 0 .. 1 on the theme's ramp."""
    place = min(max(value, 0.0), 1.0) * (len(theme.ramp) - 1)
    i = min(int(place), len(theme.ramp) - 2)
    low, high = theme.ramp[i], theme.ramp[i + 1]
    red, green, blue = (round(a + (b - a) * (place - i)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _enlarged(points: Sequence[Position]) -> list[Position]:
    return [(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in points]


def _dashes(points: Sequence[Position], length: float) -> list[list[Position]]:
    """The parts of a line that are drawn, every second ``length`` of it."""
    parts: list[list[Position]] = []
    part = [points[0]]
    left, drawn = length, True
    for (x0, y0), (x1, y1) in pairwise(points):
        distance, done = math.hypot(x1 - x0, y1 - y0), 0.0
        while distance - done > left:
            done += left
            corner = (x0 + (x1 - x0) * done / distance, y0 + (y1 - y0) * done / distance)
            if drawn:
                parts.append([*part, corner])
            part, left, drawn = [corner], length, not drawn
        left -= distance - done
        part.append((x1, y1))
    if drawn and len(part) > 1:
        parts.append(part)
    return parts
