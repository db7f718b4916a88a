"""The cases of the study, a prompt and what its pictures are to avoid, fixed before anything was measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ...models.picture_book.scenes import PLACES, THINGS, TIMES
from ...models.picture_book.shares import shares_given
from ...models.picture_book.words import split

Kind = Literal["related", "unrelated", "absurd"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LABELS = (*PLACES, *TIMES, *THINGS)


@dataclass(frozen=True)
class Case:
    """A prompt and the labels to avoid, each a concept of its own.

    ``kind``: "related" where pictures of the prompt show the thing though it does not ask for it, "unrelated" where
    none does, "absurd" where it asks for the thing itself.
    """

    kind: Kind
    prompt: str
    avoid: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.prompt}, avoid {' and '.join(self.avoid)}"

    @property
    def asked(self) -> tuple[str, ...]:
        """The labels that the prompt names, less those to avoid."""
        said = split(self.prompt)
        return tuple(label for label in LABELS if label in said and label not in self.avoid)

    def expected(self) -> dict[str, float]:
        """The exact share of every label in scenes with such a caption."""
        return shares_given(split(self.prompt))


def _cases(kind: Kind, pairs: Sequence[tuple[str, ...]]) -> tuple[Case, ...]:
    return tuple(Case(kind, prompt, tuple(avoid)) for prompt, *avoid in pairs)


CASES = (
    *_cases(
        "related",
        [
            ("a park by day", "flower"),
            ("a park", "tree"),
            ("a desert by day", "cactus"),
            ("the sea", "boat"),
            ("the sea by day", "whale"),
            ("a street", "house"),
            ("a street by day with a house", "car"),
            ("the mountains by day", "cloud"),
            ("a desert at night", "moon"),  # likely by night alone
            ("a desert", "sun"),
            ("a street", "night"),
            ("the mountains", "evening"),
            ("the moon and a house", "night"),  # nearly certain
            ("a park by day", "tree", "flower"),  # two things at once
        ],
    ),
    *_cases(
        "unrelated",
        [
            ("a park by day", "boat"),
            ("a park by day with a tree", "whale"),
            ("a park at night", "cactus"),
            ("the sea by day", "cactus"),
            ("the sea with a boat", "tree"),
            ("the sea at night", "car"),
            ("a street by day", "lighthouse"),
            ("a street in the evening with a car", "boat"),
            ("a desert by day", "lamp"),
            ("a desert at night with a cactus", "rainbow"),
            ("the mountains by day", "moon"),
            ("the mountains at night", "sun"),
        ],
    ),
    *_cases(
        "absurd",
        [
            ("a park by day with a tree", "tree"),
            ("the sea by day with a boat", "boat"),
            ("a street at night", "night"),
            ("a desert by day", "desert"),
            ("a park with a cat", "cat"),
            ("the mountains by day with a balloon", "balloon"),
        ],
    ),
)
