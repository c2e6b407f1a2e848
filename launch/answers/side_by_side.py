"""The answers of two models beside each other, as wide as the terminal is."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..terminal.fitting_table import fitting_table
from .answer import Answer

if TYPE_CHECKING:
    from rich.table import Table

NARROW = 60
"""Below this many characters two columns are hard to read; then the answers are shown one below the other."""


def beside_each_other(names: Sequence[str], answers: Sequence[Answer], width: int) -> "Table":
    """A table of one prompt's answers, at most ``width`` characters wide.

    Args:
        names: Of the two models.
        answers: Of the two models, in that order.
        width: Of the terminal.
    """
    titles = [f"{name} ({number})" for number, name in enumerate(names, 1)] if names[0] == names[1] else names
    if width < NARROW:
        rows = [[f"{title}:\n{made.text.strip()}\n({made.words()})"] for title, made in zip(titles, answers)]
        return fitting_table(None, ["answers"], rows, width, text=["answers"])
    return fitting_table(
        None, titles, [[made.text.strip() for made in answers], [f"({made.words()})" for made in answers]], width, text=titles
    )


def common_words(answers: Sequence[Answer], same_tokens: bool) -> str:
    """How far two answers are the same."""
    one, other = answers
    if one.text == other.text:
        return "both answers are the same"
    # ids of different vocabularies cannot be compared
    if not same_tokens:
        return ""
    # one answer may be the beginning of the other
    alike = next((at for at, (a, b) in enumerate(zip(one.ids, other.ids)) if a != b), min(len(one.ids), len(other.ids)))
    return (
        f"the first {alike:,} tokens are the same"
        if alike > 1
        else "the first token is the same"
        if alike
        else "they differ from the first token on"
    )
