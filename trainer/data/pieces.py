"""What a unit of text is made of: files, parts of their rows, and shards of a dataset of the hub; as data for JSON and back."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

_HUB_FIELDS = 6
"""Fields of a ``HubPiece``, by which a plan's units are told apart."""


@dataclass(frozen=True)
class Piece:
    """A file of a unit, or the part of its rows from ``begin`` to ``end``: lines that begin there, or that share of its row groups."""

    path: str
    begin: int
    end: int
    """Bytes; a whole file ends with ``size``."""
    size: int
    """Bytes of the file."""

    @property
    def whole(self) -> bool:
        """Whether the piece is all of its file."""
        return self.begin == 0 and self.end == self.size

    def is_here(self) -> bool:
        """Whether this machine has the file, with the same size."""
        try:
            return Path(self.path).stat().st_size == self.size
        except OSError:
            return False


@dataclass(frozen=True)
class HubPiece:
    """A shard of a dataset of the hub, which is read over the network (``hub.py``)."""

    name: str
    config: str | None
    split: str
    revision: str | None
    """Commit; None for a local folder."""
    shard: int
    shards: int
    """Shards of the dataset."""

    def is_here(self) -> bool:
        """Whether this machine can read it; every machine reaches the hub, or fails with its message."""
        return True


Unit = tuple[Piece, ...] | tuple[HubPiece, ...]


def plain_units(units: Sequence[Unit]) -> list[list[list[Any]]]:
    """``units`` as data for JSON; ``units_from`` reads it."""
    return [[list(astuple(piece)) for piece in unit] for unit in units]


def units_from(plain: Sequence[Sequence[Sequence[Any]]]) -> list[Unit]:
    """Inverse of ``plain_units``."""
    return [
        tuple(HubPiece(*piece) for piece in unit) if len(unit[0]) == _HUB_FIELDS else tuple(Piece(*piece) for piece in unit)
        for unit in plain
    ]
