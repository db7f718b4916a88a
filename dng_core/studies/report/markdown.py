"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def line(cells: Iterable[str]) -> str:
    """One row of a table."""
    return "| " + " | ".join(cells) + " |"


def table_lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table: its head, the rule below it, and its rows."""
    return [line(head), line(["---"] * len(head)), *map(line, rows)]
