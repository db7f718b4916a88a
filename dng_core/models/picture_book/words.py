"""The words that the picture book knows, and the tokens that stand for them."""

import re
from collections.abc import Sequence

from .scenes import COLOURS, PLACES, THINGS, TIMES

START, END, EMPTY = 0, 1, 2  # the tokens before the first word, after the last one, and of the places left over
GRAMMAR = ("a", "the", "in", "at", "by", "with", "and")
WORDS = (*GRAMMAR, *PLACES, *TIMES, *COLOURS, *THINGS)
FIRST_WORD = 3
TOKENS = FIRST_WORD + len(WORDS)
LENGTH = 32  # tokens of a prompt; a caption has at most 28 words (seven things with colours), and two tokens more
MOST_WORDS = LENGTH - 2


def split(text: str) -> list[str]:
    """The words of a text, in lower case, without punctuation."""
    return re.findall(r"[^\W_]+", text.lower())


def unknown(words: Sequence[str]) -> list[str]:
    """Those words that the picture book does not know, each once, in their order."""
    return [word for word in dict.fromkeys(words) if word not in WORDS]


def numbers(words: Sequence[str]) -> list[int]:
    """The tokens of known words, without the tokens around them."""
    return [FIRST_WORD + WORDS.index(word) for word in words]


def tokens(words: Sequence[str]) -> list[int]:
    """The LENGTH tokens of a prompt.

    Raises
    ------
    ValueError: for unknown words (it lists the known ones), or for more than MOST_WORDS words.
    """
    if strange := unknown(words):
        raise ValueError(
            f"the picture book does not know {', '.join(map(repr, strange))}; it knows the words {', '.join(WORDS)}"
        )
    if len(words) > MOST_WORDS:
        raise ValueError(f"the prompt has {len(words)} words; the picture book reads at most {MOST_WORDS}: shorten it")
    inner = [START, *numbers(words), END]
    return inner + [EMPTY] * (LENGTH - len(inner))
