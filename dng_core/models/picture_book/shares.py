"""What is likely in a scene of which a caption is known: the exact shares that a model of scenes should draw.

A thing that a caption leaves out is less likely than its place and time say, since captions name most things.
"""

import itertools
from collections.abc import Collection, Iterator

from .scenes import (
    BACKGROUND,
    GROUND,
    NAMES_PLACE,
    NAMES_THING,
    NAMES_TIME,
    PLACES,
    SAYS_NOTHING,
    SKY,
    THINGS,
    TIME_SHARES,
    TIMES,
    possible_sets,
)


def shares_given(words: Collection[str]) -> dict[str, float]:
    """The probability of every place, time and thing in a scene whose caption has these words.

    Raises
    ------
    ValueError: for words that no caption has together (a boat in a desert, the sun at night).
    """
    shares = dict.fromkeys((*PLACES, *TIMES, *THINGS), 0.0)
    for weight, labels in _cases(words):
        for name, p in labels.items():
            shares[name] += weight * p
    total = sum(shares[time] for time in TIMES)
    if total == 0:
        raise ValueError(f"no scene has a caption with the words {', '.join(words)}")
    return {name: share / total for name, share in shares.items()}


def _cases(words: Collection[str]) -> Iterator[tuple[float, dict[str, float]]]:
    """Every place and time that the words allow: a weight, and the shares of all labels in that case."""
    said = set(words) & {*PLACES, *TIMES, *THINGS}
    places = [place for place in PLACES if place in said] or PLACES
    times = [time for time in TIMES if time in said] or TIMES
    named = (NAMES_PLACE if said & set(PLACES) else 1 - NAMES_PLACE) * (
        NAMES_TIME if said & set(TIMES) else 1 - NAMES_TIME
    )
    captions = [((1 - SAYS_NOTHING) * named, 1 - NAMES_THING)]
    if not said:  # then the caption may also be one that says nothing on purpose
        captions.append((SAYS_NOTHING, 1.0))
    for (weight, left_out), place, time in itertools.product(captions, places, times):
        labels = {place: 1.0, time: 1.0}
        weight *= TIME_SHARES[TIMES.index(time)]
        for group in (SKY, BACKGROUND, GROUND):
            likelihoods = [
                (set(members), p * left_out ** len(set(members) - said))
                for members, p in zip(*possible_sets(group, place, time), strict=True)
                if said & set(group) <= set(members)
            ]
            total = float(sum(p for _, p in likelihoods))
            weight *= total
            for name in group:
                labels[name] = float(sum(p for members, p in likelihoods if name in members)) / total if total else 0.0
        yield weight, labels
