"""Scenes of the picture book: what is in a picture, with which probability, and what is said of it.

A scene is a place, a time of day, and some of eighteen things. Each thing has a probability that depends on place and
time (:data:`CHANCES`, :data:`TIMES_OF`); at most three of those in the sky and three of those on the ground share a
picture. Everything is drawn from a generator that the caller gives, so that a seed names a scene.
"""

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np

PLACES = ("park", "street", "sea", "desert", "mountains")
TIMES = ("day", "evening", "night")
TIME_SHARES = (0.5, 0.25, 0.25)
COLOURS = ("red", "yellow", "blue", "white")
SKY = ("sun", "moon", "cloud", "bird", "balloon")
BACKGROUND = ("rainbow",)  # behind everything, beside any number of things
GROUND = ("tree", "flower", "cactus", "house", "car", "lamp", "cat", "ball", "boat", "whale", "lighthouse", "tent")
THINGS = SKY + BACKGROUND + GROUND
COLOURED = ("balloon", "flower", "house", "car", "ball", "boat", "tent")
MOST = 3  # things in the sky, and things on the ground

CHANCES = {  # how likely a thing is at each place, in the order of PLACES; a choice
    "sun": (0.5, 0.4, 0.5, 0.7, 0.4),
    "moon": (0.6, 0.5, 0.6, 0.7, 0.6),
    "cloud": (0.4, 0.4, 0.4, 0.1, 0.5),
    "bird": (0.3, 0.15, 0.4, 0.1, 0.3),
    "balloon": (0.2, 0.1, 0.1, 0.25, 0.25),
    "rainbow": (0.15, 0.1, 0.15, 0.0, 0.2),
    "tree": (0.75, 0.25, 0.0, 0.0, 0.5),
    "flower": (0.45, 0.1, 0.0, 0.1, 0.25),
    "cactus": (0.0, 0.0, 0.0, 0.75, 0.0),
    "house": (0.1, 0.65, 0.0, 0.1, 0.35),
    "car": (0.05, 0.6, 0.0, 0.2, 0.05),
    "lamp": (0.2, 0.45, 0.0, 0.0, 0.0),
    "cat": (0.3, 0.25, 0.0, 0.1, 0.1),
    "ball": (0.35, 0.15, 0.1, 0.1, 0.05),
    "boat": (0.0, 0.0, 0.6, 0.0, 0.0),
    "whale": (0.0, 0.0, 0.35, 0.0, 0.0),
    "lighthouse": (0.0, 0.0, 0.35, 0.0, 0.0),
    "tent": (0.15, 0.0, 0.0, 0.25, 0.4),
}
TIMES_OF = {  # factors of these chances by day, in the evening and at night; 1 for all others
    "sun": (1.0, 1.0, 0.0),
    "moon": (0.0, 0.3, 1.0),
    "cloud": (1.0, 1.0, 0.4),
    "bird": (1.0, 1.0, 0.0),
    "balloon": (1.0, 1.0, 0.3),
    "rainbow": (1.0, 0.0, 0.0),
    "lamp": (0.7, 1.0, 1.5),
}

SAYS_NOTHING = 0.05  # the share of pictures without a caption
NAMES_PLACE, NAMES_TIME, NAMES_THING, NAMES_COLOUR = 0.8, 0.6, 0.6, 0.6
PLACE_WORDS = {"park": "a", "street": "a", "sea": "the", "desert": "a", "mountains": "the"}
TIME_WORDS = {"day": "by day", "evening": "in the evening", "night": "at night"}


@dataclass(frozen=True)
class Thing:
    """A thing of a picture; ``colour`` is "" for things whose colour nobody names."""

    name: str
    colour: str = ""


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    place: str
    time: str
    things: tuple[Thing, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its things."""
        return tuple(thing.name for thing in self.things)

    def labels(self) -> np.ndarray:
        """int64 (2 + things,): the numbers of place and time, then 1 for each of THINGS that is there."""
        there = [int(name in self.names) for name in THINGS]
        return np.array([PLACES.index(self.place), TIMES.index(self.time), *there])


def chance(thing: str, place: str, time: str) -> float:
    """How likely a thing would be if there were room for all."""
    factor = TIMES_OF.get(thing, (1.0, 1.0, 1.0))[TIMES.index(time)]
    return min(1.0, CHANCES[thing][PLACES.index(place)] * factor)


def share(thing: str, place: str, time: str) -> float:
    """The exact share of pictures with this place and time that show the thing."""
    for group in (SKY, BACKGROUND, GROUND):
        if thing in group:
            sets, shares = possible_sets(group, place, time)
            return float(sum(p for members, p in zip(sets, shares, strict=True) if thing in members))
    raise ValueError(f"{thing!r} is not one of {', '.join(THINGS)}")


@cache
def possible_sets(group: tuple[str, ...], place: str, time: str) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """The sets of at most MOST things of a group, and their probabilities: independent chances, given that limit."""
    chances = {name: chance(name, place, time) for name in group}
    sets, shares = [], []
    for size in range(MOST + 1):
        for members in itertools.combinations(group, size):
            p = float(np.prod([chances[name] if name in members else 1 - chances[name] for name in group]))
            if p:
                sets.append(members)
                shares.append(p)
    return sets, np.array(shares) / sum(shares)


def random_scene(generator: np.random.Generator) -> Scene:
    """A scene; all places are equally likely."""
    place = PLACES[int(generator.integers(len(PLACES)))]
    time = TIMES[_draw(generator, np.array(TIME_SHARES))]
    names: list[str] = []
    for group in (SKY, BACKGROUND, GROUND):
        sets, shares = possible_sets(group, place, time)
        names += sets[_draw(generator, shares)]
    colours = generator.integers(len(COLOURS), size=len(names))
    return Scene(
        place,
        time,
        tuple(Thing(n, COLOURS[c] if n in COLOURED else "") for n, c in zip(names, colours, strict=True)),
    )


def caption(scene: Scene, generator: np.random.Generator) -> str:
    """What a caption says of a scene: each part with its own probability, in one of three forms; at times nothing.

    The forms are "a park at night with a tree and a red car", "a tree and a red car in a park at night", and "park,
    night, tree, red car".
    """
    if generator.random() < SAYS_NOTHING:
        return ""
    place = scene.place if generator.random() < NAMES_PLACE else ""
    time = scene.time if generator.random() < NAMES_TIME else ""
    things = []
    for i in generator.permutation(len(scene.things)):
        thing = scene.things[i]
        if generator.random() < NAMES_THING:
            named = bool(thing.colour) and generator.random() < NAMES_COLOUR
            things.append(f"{thing.colour} {thing.name}" if named else thing.name)
    form = generator.integers(3)
    if form == 2:
        return ", ".join(filter(None, (place, time, *things)))
    where = f"{PLACE_WORDS[place]} {place}" if place else ""
    when = TIME_WORDS[time] if time else ""
    what = _listed([f"a {thing}" for thing in things])
    if form == 0 or not what:
        return " ".join(filter(None, (where, when, f"with {what}" if where and what else what)))
    at = f"{'at' if place == 'sea' else 'in'} {where}" if where else ""
    return " ".join(filter(None, (what, at, when)))


def _listed(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "".join(parts)


def _draw(generator: np.random.Generator, shares: np.ndarray) -> int:
    """A number drawn with these probabilities."""
    return min(int(np.searchsorted(np.cumsum(shares), generator.random(), side="right")), len(shares) - 1)
