"""Draws scenes: pictures of 64x64 pixels, from filled shapes, at twice the size and then made smaller."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from .scenes import BACKGROUND, SKY, Scene

SIZE = 64
FINE = 2  # shapes are drawn at this many times the size, which smooths their edges
Colour = tuple[float, float, float]
Point = tuple[float, float]

PAINT: dict[str, Colour] = {
    "red": (214, 48, 44),
    "yellow": (244, 202, 46),
    "blue": (48, 92, 214),
    "white": (242, 242, 238),
}
SKIES = {  # top, and at the horizon
    "day": ((96, 168, 236), (190, 224, 250)),
    "evening": ((112, 66, 138), (250, 150, 84)),
    "night": ((10, 14, 44), (32, 40, 84)),
}
TINTS = {"day": (1.0, 1.0, 1.0), "evening": (0.86, 0.70, 0.64), "night": (0.56, 0.60, 0.74)}
GROUNDS = {
    "park": (104, 178, 78),
    "street": (150, 148, 150),
    "sea": (44, 116, 176),
    "desert": (232, 196, 122),
    "mountains": (124, 150, 96),
}
LIGHT = (255, 226, 120)  # of windows and lamps, and of the moon


class Brush:
    """Draws in pixels of the finished picture; colours are tinted by the time of day unless they shine."""

    def __init__(self, image: Image.Image, tint: Colour) -> None:
        self.pen, self.tint = ImageDraw.Draw(image), tint

    def polygon(self, points: Sequence[Point], colour: Colour, shines: bool = False) -> None:
        self.pen.polygon([(FINE * x, FINE * y) for x, y in points], self._ink(colour, shines))

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, shines: bool = False) -> None:
        self.pen.rectangle((FINE * x0, FINE * y0, FINE * x1 - 1, FINE * y1 - 1), self._ink(colour, shines))

    def oval(self, x: float, y: float, rx: float, ry: float, colour: Colour, shines: bool = False) -> None:
        box = (FINE * (x - rx), FINE * (y - ry), FINE * (x + rx), FINE * (y + ry))
        self.pen.ellipse(box, self._ink(colour, shines))

    def line(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        ink = self._ink(colour, False)
        self.pen.line([(FINE * x, FINE * y) for x, y in points], ink, round(FINE * width), "curve")

    def arc(self, x: float, y: float, r: float, colour: Colour, width: float) -> None:
        box = (FINE * (x - r), FINE * (y - r), FINE * (x + r), FINE * (y + r))
        self.pen.arc(box, 180, 360, self._ink(colour, True), round(FINE * width))

    def _ink(self, colour: Colour, shines: bool) -> tuple[int, int, int]:
        r, g, b = colour if shines else (c * t for c, t in zip(colour, self.tint, strict=True))
        return int(r), int(g), int(b)


def draw(scene: Scene, generator: np.random.Generator) -> np.ndarray:
    """A picture of a scene, uint8 (64, 64, 3); the generator decides places, sizes and shades."""
    horizon = float(generator.uniform(31, 37))
    small = Image.fromarray(_sky(scene.time, horizon, generator))
    image = small.resize((FINE * SIZE, FINE * SIZE), Image.Resampling.NEAREST)
    brush = Brush(image, TINTS[scene.time])
    things = {thing.name: thing.colour for thing in scene.things}
    for name in BACKGROUND:
        if name in things:
            _rainbow(brush, float(generator.uniform(24, 40)), horizon, float(generator.uniform(21, 26)))
    _ground(brush, scene.place, horizon, generator)
    sky, ground = ([name for name in things if (name in SKY) == up and name not in BACKGROUND] for up in (True, False))
    for name, x in zip(sky, _slots(len(sky), generator), strict=True):
        low = name == "sun" and scene.time == "evening"
        y = float(generator.uniform(17, 22) if low else generator.uniform(9, 14))
        DRAWN[name](brush, x, y, float(generator.uniform(0.85, 1.1)), _paint(things[name], generator), scene.time)
    bases = np.sort(generator.uniform(horizon + 8, 61, size=len(ground)))
    for name, x, y in zip(generator.permutation(ground), _slots(len(ground), generator), bases, strict=True):
        size = float(generator.uniform(0.85, 1.05)) * (0.9 + 0.2 * (y - horizon) / (64 - horizon))
        DRAWN[name](brush, x, float(y), size, _paint(things[name], generator), scene.time)
    return np.asarray(image.reduce(FINE))


def _slots(count: int, generator: np.random.Generator) -> list[float]:
    """Where ``count`` things stand, from three slots side by side, so that they do not hide one another."""
    slots = generator.permutation(3)[:count]
    return [float(11 + 21 * slot + generator.uniform(-1.5, 1.5)) for slot in slots]


def _paint(colour: str, generator: np.random.Generator) -> Colour:
    r, g, b = (float(c) for c in np.array(PAINT.get(colour, (128, 128, 128))) + generator.uniform(-12, 12, size=3))
    return max(r, 0.0), max(g, 0.0), max(b, 0.0)


def _sky(time: str, horizon: float, generator: np.random.Generator) -> np.ndarray:
    top, low = (np.array(c) + generator.uniform(-8, 8, size=3) for c in SKIES[time])
    share = np.clip(np.arange(SIZE) / horizon, 0, 1)[:, None]
    rows = (top + (low - top) * share).clip(0, 255).astype(np.uint8)
    return np.repeat(rows[:, None], SIZE, axis=1)


def _ground(brush: Brush, place: str, horizon: float, generator: np.random.Generator) -> None:
    r, g, b = (float(c) for c in np.array(GROUNDS[place]) + generator.uniform(-8, 8, size=3))
    if place == "mountains":
        for x, height in zip((8.0, 54.0, 31.0), generator.uniform(14, 24, size=3), strict=True):
            x += generator.uniform(-5, 5)
            peak, foot = horizon - height, horizon + 1
            shade = float(generator.uniform(-10, 10))
            brush.polygon([(x - 24, foot), (x, peak), (x + 24, foot)], (112 + shade, 116 + shade, 134 + shade))
            brush.polygon([(x - 7, peak + 7), (x, peak), (x + 7, peak + 7), (x + 2, peak + 5)], (244, 246, 250))
    brush.box(0, horizon, SIZE, SIZE, (r, g, b))
    if place == "desert":
        x = float(generator.uniform(10, 54))
        brush.oval(x, horizon + 1, 26, 5, (r - 14, g - 16, b - 18))
        brush.oval(x + (30 if x < 32 else -30), horizon + 2, 24, 3, (r - 6, g - 8, b - 10))
    elif place == "street":
        brush.box(0, horizon + 9, SIZE, SIZE, (76, 76, 84))
        offset = float(generator.uniform(0, 16))
        for x in np.arange(-16, 80, 16) + offset:
            brush.box(float(x), horizon + 18, float(x) + 8, horizon + 20, (236, 232, 200))
    elif place == "sea":
        for y in np.arange(horizon + 4, SIZE, 7):
            x = float(generator.uniform(-4, 10))
            for left in np.arange(x, SIZE, 20):
                brush.box(float(left), float(y), float(left) + 9, float(y) + 1.5, (120, 180, 220))
    elif place == "park":
        x = float(generator.uniform(14, 50))
        brush.polygon([(x - 2, horizon), (x + 2, horizon), (x + 12, SIZE), (x - 12, SIZE)], (214, 190, 146))


def _rainbow(brush: Brush, x: float, y: float, r: float) -> None:
    for i, colour in enumerate(((226, 60, 60), (244, 160, 50), (246, 224, 80), (90, 180, 90), (80, 110, 210))):
        brush.arc(x, y + 2, r - 1.6 * i, colour, 2.2)


def _sun(brush: Brush, x: float, y: float, s: float, paint: Colour, time: str) -> None:
    colour = (255, 226, 70) if time == "day" else (255, 120, 50)
    glow = (255, 240, 170) if time == "day" else (255, 176, 96)
    for angle in np.arange(8) * math.pi / 4:
        tip = (x + 9 * s * math.cos(angle), y + 9 * s * math.sin(angle))
        side = (2.4 * s * math.sin(angle), -2.4 * s * math.cos(angle))
        brush.polygon([tip, (x + side[0], y + side[1]), (x - side[0], y - side[1])], glow, True)
    brush.oval(x, y, 6 * s, 6 * s, colour, True)


def _moon(brush: Brush, x: float, y: float, s: float, paint: Colour, time: str) -> None:
    outer = [(x + 7.5 * s * math.cos(a), y + 7.5 * s * math.sin(a)) for a in np.linspace(1.0, 2 * math.pi - 1.0, 14)]
    inner = [
        (x + 4.1 * s + 6.3 * s * math.cos(a), y + 6.3 * s * math.sin(a))
        for a in np.linspace(2 * math.pi - 1.57, 1.57, 14)
    ]
    brush.polygon(outer + inner, LIGHT, True)


def _cloud(brush: Brush, x: float, y: float, s: float, paint: Colour, time: str) -> None:
    white = (248, 248, 250)
    brush.oval(x - 5 * s, y + 1.5 * s, 4.5 * s, 3.5 * s, white)
    brush.oval(x + 5 * s, y + 1.5 * s, 4.5 * s, 3.5 * s, white)
    brush.oval(x, y - 1 * s, 5.5 * s, 5 * s, white)
    brush.box(x - 6 * s, y + 1.5 * s, x + 6 * s, y + 5 * s, white)


def _bird(brush: Brush, x: float, y: float, s: float, paint: Colour, time: str) -> None:
    black = (34, 34, 44)
    brush.polygon([(x - 9 * s, y - 4 * s), (x - 3 * s, y - 4 * s), (x, y + 2.5 * s), (x - 2.5 * s, y + 1 * s)], black)
    brush.polygon([(x + 9 * s, y - 4 * s), (x + 3 * s, y - 4 * s), (x, y + 2.5 * s), (x + 2.5 * s, y + 1 * s)], black)
    brush.oval(x, y + 1 * s, 2.6 * s, 3.2 * s, black)


def _balloon(brush: Brush, x: float, y: float, s: float, paint: Colour, time: str) -> None:
    y -= 1
    ropes = [(x - 5 * s, y + 4 * s), (x + 5 * s, y + 4 * s), (x + 1.5 * s, y + 10 * s), (x - 1.5 * s, y + 10 * s)]
    brush.polygon(ropes, (130, 100, 70))
    brush.oval(x, y, 7 * s, 7 * s, paint)
    brush.oval(x, y, 2.4 * s, 7 * s, (70, 70, 80))
    brush.box(x - 2 * s, y + 9 * s, x + 2 * s, y + 12 * s, (110, 70, 40))


def _tree(brush: Brush, x: float, y: float, s: float, paint: Colour, time: str) -> None:
    brush.box(x - 1.8 * s, y - 9 * s, x + 1.8 * s, y, (112, 74, 42))
    brush.oval(x - 3.5 * s, y - 12 * s, 5 * s, 5 * s, (36, 112, 46))
    brush.oval(x + 3.5 * s, y - 12 * s, 5 * s, 5 * s, (36, 112, 46))
    brush.oval(x, y - 16 * s, 6 * s, 6 * s, (46, 130, 54))


def _flower(brush: Brush, x: float, y: float, s: float, paint: Colour, time: str) -> None:
    brush.box(x - 0.9 * s, y - 9 * s, x + 0.9 * s, y, (28, 104, 40))
    brush.polygon([(x, y - 2 * s), (x + 5 * s, y - 6 * s), (x + 1 * s, y - 5 * s)], (28, 104, 40))
    for angle in np.arange(5) * 2 * math.pi / 5 - math.pi / 2:
        brush.oval(x + 3.9 * s * math.cos(angle), y - 11 * s + 3.9 * s * math.sin(angle), 2.9 * s, 2.9 * s, paint)
    brush.oval(x, y - 11 * s, 2.4 * s, 2.4 * s, (120, 60, 20))


def _cactus(brush: Brush, x: float, y: float, s: float, paint: Colour, time: str) -> None:
    green = (40, 134, 74)
    brush.box(x - 2.2 * s, y - 18 * s, x + 2.2 * s, y, green)
    brush.oval(x, y - 18 * s, 2.2 * s, 2.2 * s, green)
    for side in (-1, 1):
        low, high = (-7, -13) if side < 0 else (-9, -16)
        brush.box(min(x, x + side * 7 * s), y + low * s - 3 * s, max(x, x + side * 7 * s), y + low * s, green)
        brush.box(x + side * 5.5 * s - 1.6 * s, y + high * s, x + side * 5.5 * s + 1.6 * s, y + low * s, green)


def _house(brush: Brush, x: float, y: float, s: float, paint: Colour, time: str) -> None:
    brush.box(x - 7.5 * s, y - 11 * s, x + 7.5 * s, y, paint)
    brush.polygon([(x - 9.5 * s, y - 10.5 * s), (x, y - 19 * s), (x + 9.5 * s, y - 10.5 * s)], (124, 64, 44))
    brush.box(x - 5.5 * s, y - 7 * s, x - 1.5 * s, y, (84, 52, 34))
    window = LIGHT if time != "day" else (150, 206, 232)
    brush.box(x + 1 * s, y - 8 * s, x + 5.5 * s, y - 4 * s, window, True)


def _car(brush: Brush, x: float, y: float, s: float, paint: Colour, time: str) -> None:
    brush.polygon(
        [(x - 6.5 * s, y - 6 * s), (x - 4 * s, y - 11 * s), (x + 3 * s, y - 11 * s), (x + 6 * s, y - 6 * s)], paint
    )
    brush.polygon(
        [(x - 4.6 * s, y - 6.5 * s), (x - 3 * s, y - 9.8 * s), (x + 2.2 * s, y - 9.8 * s), (x + 4.2 * s, y - 6.5 * s)],
        (170, 210, 230),
    )
    brush.box(x - 9.5 * s, y - 7 * s, x + 9.5 * s, y - 2 * s, paint)
    for wheel in (-5.2, 5.2):
        brush.oval(x + wheel * s, y - 2 * s, 2.8 * s, 2.8 * s, (24, 24, 28))
        brush.oval(x + wheel * s, y - 2 * s, 1.1 * s, 1.1 * s, (190, 190, 190))


def _lamp(brush: Brush, x: float, y: float, s: float, paint: Colour, time: str) -> None:
    brush.box(x - 1.2 * s, y - 18 * s, x + 1.2 * s, y, (40, 44, 52))
    brush.box(x - 3.5 * s, y - 2 * s, x + 3.5 * s, y, (40, 44, 52))
    if time != "day":
        brush.oval(x, y - 20 * s, 5.4 * s, 5.4 * s, (226, 190, 90), True)
    brush.oval(x, y - 20 * s, 3.8 * s, 3.8 * s, (250, 244, 214) if time == "day" else LIGHT, time != "day")
    brush.polygon([(x - 5 * s, y - 22.5 * s), (x, y - 26 * s), (x + 5 * s, y - 22.5 * s)], (40, 44, 52))


def _cat(brush: Brush, x: float, y: float, s: float, paint: Colour, time: str) -> None:
    fur = (236, 140, 50)
    brush.line([(x - 6 * s, y - 3 * s), (x - 9 * s, y - 7 * s), (x - 8 * s, y - 12 * s)], fur, 2.2 * s)
    brush.oval(x - 1.5 * s, y - 4.5 * s, 6.5 * s, 4.5 * s, fur)
    brush.oval(x + 5 * s, y - 9 * s, 4.4 * s, 4.2 * s, fur)
    for ear in (-1, 1):
        brush.polygon(
            [
                (x + (5 + 4.2 * ear) * s, y - 10 * s),
                (x + (5 + 3.8 * ear) * s, y - 16 * s),
                (x + (5 + 0.4 * ear) * s, y - 12.5 * s),
            ],
            fur,
        )
        brush.oval(x + (5 + 1.8 * ear) * s, y - 9.5 * s, 0.9 * s, 1.2 * s, (20, 30, 20))
    brush.box(x - 6 * s, y - 2.5 * s, x - 4 * s, y, fur)
    brush.box(x + 1.5 * s, y - 2.5 * s, x + 3.5 * s, y, fur)


def _ball(brush: Brush, x: float, y: float, s: float, paint: Colour, time: str) -> None:
    brush.oval(x, y - 6 * s, 6 * s, 6 * s, (40, 40, 48))
    brush.oval(x, y - 6 * s, 5 * s, 5 * s, paint)
    brush.box(x - 4.6 * s, y - 7.2 * s, x + 4.6 * s, y - 4.8 * s, (40, 40, 48))


def _boat(brush: Brush, x: float, y: float, s: float, paint: Colour, time: str) -> None:
    brush.polygon(
        [(x - 9.5 * s, y - 5 * s), (x + 9.5 * s, y - 5 * s), (x + 6.5 * s, y), (x - 6.5 * s, y)], (112, 68, 38)
    )
    brush.box(x - 0.8 * s, y - 20 * s, x + 0.8 * s, y - 5 * s, (60, 40, 30))
    brush.polygon([(x + 1 * s, y - 19 * s), (x + 9 * s, y - 7 * s), (x + 1 * s, y - 7 * s)], paint)
    brush.polygon([(x - 1 * s, y - 17 * s), (x - 7 * s, y - 7 * s), (x - 1 * s, y - 7 * s)], paint)


def _whale(brush: Brush, x: float, y: float, s: float, paint: Colour, time: str) -> None:
    grey = (52, 58, 84)
    brush.polygon(
        [(x - 6 * s, y - 3 * s), (x - 10 * s, y - 11 * s), (x - 6 * s, y - 9 * s), (x - 3 * s, y - 6 * s)], grey
    )
    brush.polygon([(x - 6 * s, y - 5 * s), (x - 10 * s, y - 11 * s), (x - 11 * s, y - 6 * s)], grey)
    brush.oval(x + 1 * s, y - 4.5 * s, 8.5 * s, 5 * s, grey)
    brush.oval(x + 3 * s, y - 2 * s, 5.5 * s, 2 * s, (206, 210, 220))
    brush.oval(x + 6 * s, y - 5.5 * s, 1 * s, 1 * s, (250, 250, 250))
    for side in (-1, 1):
        spout = [
            (x + 3 * s, y - 9.5 * s),
            (x + (3 + side * 1.2) * s, y - 13 * s),
            (x + (3 + side * 4) * s, y - 13.5 * s),
        ]
        brush.line(spout, (222, 240, 250), 1.5)


def _lighthouse(brush: Brush, x: float, y: float, s: float, paint: Colour, time: str) -> None:
    brush.oval(x, y - 1 * s, 8.5 * s, 4 * s, (96, 90, 86))
    for i in range(4):
        top, low, wide = y - (20 - 4.5 * i) * s, y - (15.5 - 4.5 * i) * s, (3 + 0.45 * i) * s
        colour = PAINT["white"] if i % 2 else PAINT["red"]
        brush.polygon(
            [(x - wide, top), (x + wide, top), (x + wide + 0.45 * s, low), (x - wide - 0.45 * s, low)], colour
        )
    brush.box(x - 2.4 * s, y - 24 * s, x + 2.4 * s, y - 20 * s, LIGHT, True)
    brush.polygon([(x - 3.6 * s, y - 24 * s), (x, y - 27 * s), (x + 3.6 * s, y - 24 * s)], (60, 60, 70))


def _tent(brush: Brush, x: float, y: float, s: float, paint: Colour, time: str) -> None:
    brush.polygon([(x - 9.5 * s, y), (x, y - 14 * s), (x + 9.5 * s, y)], paint)
    brush.polygon([(x - 3.5 * s, y), (x, y - 9 * s), (x + 3.5 * s, y)], (50, 40, 50))
    brush.line([(x - 1.2 * s, y - 15.5 * s), (x, y - 14 * s), (x + 1.2 * s, y - 15.5 * s)], (60, 50, 40), 1.0)


DRAWN: dict[str, Callable[[Brush, float, float, float, Colour, str], None]] = {
    "sun": _sun,
    "moon": _moon,
    "cloud": _cloud,
    "bird": _bird,
    "balloon": _balloon,
    "tree": _tree,
    "flower": _flower,
    "cactus": _cactus,
    "house": _house,
    "car": _car,
    "lamp": _lamp,
    "cat": _cat,
    "ball": _ball,
    "boat": _boat,
    "whale": _whale,
    "lighthouse": _lighthouse,
    "tent": _tent,
}
