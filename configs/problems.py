"""Collects all problems of a recipe and reports them at once, each with its key path and its place.

my.yaml:4: data.seq_lenght: unknown key, did you mean 'seq_length'? (valid here: builtin, files, ...)
"""

import difflib
from collections.abc import Iterable, Sequence

from ..models.common.errors import UserError
from .nodes import KeyPath, Node, dotted, place_of

MOST_SHOWN = 40
"""Largest number of problems in one message."""


def nearest_name(word: str, valid: Iterable[str]) -> str | None:
    """Return the valid word that ``word`` most likely means; None if no word is similar."""
    # compared in lower case: 'GPTQ' means gptq, and the answer is spelt as the valid word is
    known = {candidate.lower(): candidate for candidate in valid}
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return known[close[0]] if close else None


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """Return ``", did you mean 'x'?"``, or an empty string."""
    guess = nearest_name(word, valid)
    return f", did you mean '{guess}'?" if guess else ""


class Problems:
    """Collects the problems of one recipe in the order they are found; duplicates are dropped."""

    def __init__(self, source: str, root: Node | None = None) -> None:
        """``source`` is the recipe's name in messages; ``root`` is its tree, which gives the places of key paths."""
        self._source = source
        self._root = root
        self._found: dict[str, None] = {}
        self._paths: set[KeyPath] = set()
        self._excused: set[KeyPath] = set()

    def add(self, path: Sequence[str | int], message: str, *, place: str | None = None) -> None:
        """Report that the value at ``path`` is wrong. ``place`` replaces the place from the recipe's tree."""
        keys = tuple(path)
        # with all paths above it: a section is wrong if something in it is
        self._paths.update(keys[:end] for end in range(len(keys) + 1))
        where = place if place is not None else place_of(self._root, keys) if self._root else ""
        line = ": ".join(part for part in (where, dotted(keys), message) if part)
        self._found[line] = None

    def touches(self, path: Sequence[str | int]) -> bool:
        """Return whether something at or below ``path`` is already known to be wrong."""
        return tuple(path) in self._paths

    def excuse(self, path: Sequence[str | int]) -> None:
        """Mark the key at ``path`` as the likely meaning of a misspelt key, so that it is not also reported as missing."""
        self._excused.add(tuple(path))

    def excused(self, path: Sequence[str | int]) -> bool:
        """Return whether ``excuse`` was called for ``path``."""
        return tuple(path) in self._excused

    def stop(self) -> None:
        """Raise UserError with all problems, if there are any."""
        lines = list(self._found)
        if len(lines) == 1:
            raise UserError(lines[0])
        if lines:
            more = [f"and {len(lines) - MOST_SHOWN} more"] if len(lines) > MOST_SHOWN else []
            # one line each and indented, so that a terminal and an editor find file:line in them
            told = "".join(f"\n  {line}" for line in [*lines[:MOST_SHOWN], *more])
            raise UserError(f"{self._source} has {len(lines)} problems:{told}")
