"""Which settings are best: the least imbalance among those that are safe."""

from collections.abc import Iterable
from typing import Any, TypeVar

Key = TypeVar("Key")


def safe(measures: dict[str, Any], target: float) -> bool:
    """Whether the measured forbidden share is at most the target."""
    share: float = measures["forbidden_share"]["value"]
    return share <= target


def best(measured: Iterable[tuple[Key, dict[str, Any]]], target: float, quality: str = "kl_renormalised") -> Key:
    """Of (key, measures), the key with the least ``quality`` among the safe; if none is safe, the safest one's.

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
