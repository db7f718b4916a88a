"""Which settings are best (the safe ones with the least imbalance), and which to try next."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any, Literal, TypeVar

Key = TypeVar("Key")


def safe(measures: dict[str, Any], target: float) -> bool:
    """Whether the measured forbidden share is at most the target."""
    share: float = measures["forbidden_share"]["value"]
    return share <= target


def best(measured: Iterable[tuple[Key, dict[str, Any]]], target: float, quality: str = "kl_renormalised") -> Key:
    """The key of the safe pair (key, measures) with the least ``quality``; if no pair is safe, the safest pair's key.

    A quality that could not be measured counts as the worst. Raises ValueError for no pairs at all.
    """
    pairs = list(measured)
    if not pairs:
        raise ValueError("there is nothing to choose from")

    def cost(pair: tuple[Key, dict[str, Any]]) -> tuple[bool, float, float]:
        measures = pair[1]
        is_safe = safe(measures, target)
        value = measures.get(quality, {}).get("value")
        value = float("inf") if value is None else value
        return not is_safe, 0.0 if is_safe else measures["forbidden_share"]["value"], value

    return min(pairs, key=cost)[0]


def mean_measures(measured: Sequence[dict[str, Any]], quality: str = "kl_renormalised") -> dict[str, Any]:
    """What :func:`best` looks at, averaged over several classes. The mean quality is None if one class has none."""
    qualities = [m.get(quality, {}).get("value") for m in measured]
    return {
        "forbidden_share": {"value": mean(m["forbidden_share"]["value"] for m in measured)},
        quality: {"value": None if None in qualities else mean(qualities)},
    }


def next_scale(
    scales: Sequence[float], searched: Mapping[float, bool], swept: Mapping[float, bool]
) -> tuple[Literal["search", "sweep"], float] | None:
    """What an adaptive sweep draws next: a scale with few images ("search") or with all ("sweep"); None at its end.

    A bisection with few images looks for the smallest safe scale; it assumes that larger scales leave less. The sweep
    begins at the scale found, and goes up until a scale is safe with all images.

    Parameters
    ----------
    scales: in rising order.
    searched, swept: scale -> whether it was safe with few images (``searched``) and with all (``swept``).
    """
    low, high = 0, len(scales) - 1
    while low < high:
        middle = (low + high) // 2
        if scales[middle] not in searched:
            return "search", scales[middle]
        low, high = (low, middle) if searched[scales[middle]] else (middle + 1, high)
    for scale in scales[low:]:
        if scale not in swept:
            return "sweep", scale
        if swept[scale]:
            break
    return None
