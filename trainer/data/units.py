"""Cuts files of text into units that processes encode independently: some files, or a part of the rows of a large one.

The cut depends on the files alone, never on the number of processes. The units in their order give the documents of the files in theirs.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ...models.common.errors import UserError
from .conversations import COLUMNS
from .file_documents import parquet_texts, read_file, text_of_row
from .file_rows import Row, lines_between, one_line_each, parsed_line, read_rows
from .hub import shard_rows, shard_texts
from .input_files import shown_path, suffix_of
from .pieces import HubPiece, Piece, Unit

if TYPE_CHECKING:
    from ..settings import DataSettings

UNIT_BYTES = 64 * 2**20
"""Bytes of a unit. A killed process loses at most one, and a unit takes a core about a minute."""
MOST_UNITS = 4096
"""Units grow beyond ``UNIT_BYTES`` where there would be more of them; each is a folder and a memory map."""
_LINES, _GROUPS = (".jsonl", ".ndjson"), ".parquet"


def units_of(files: Sequence[Path], *, parts: bool) -> list[Unit]:
    """The units of ``files``, in their order.

    Args:
        files: Files of text or rows.
        parts: Whether large files of JSON lines and of Parquet are cut between rows. A row of a part does not know its number in the file.
    """
    sizes = [file.stat().st_size for file in files]
    most = max(UNIT_BYTES, -(-sum(sizes) // MOST_UNITS))
    units: list[Unit] = []
    group: list[Piece] = []
    for file, size in zip(files, sizes):
        if parts and size > most and _can_be_cut(file):
            units += [tuple(group)] * bool(group)
            group = []
            number = -(-size // most)
            cuts = [size * part // number for part in range(number + 1)]
            units += [(Piece(str(file), begin, end, size),) for begin, end in pairwise(cuts)]
            continue
        group.append(Piece(str(file), 0, size, size))
        if sum(piece.size for piece in group) >= most:
            units.append(tuple(group))
            group = []
    return units + [tuple(group)] * bool(group)


def _can_be_cut(file: Path) -> bool:
    return suffix_of(file) == _GROUPS or (suffix_of(file) in _LINES and one_line_each(file))


def shards_of(settings: "DataSettings", shards: int, revision: str) -> list[Unit]:
    """The units of a streamed dataset, in order: its shards (files, or parts of them), several in one where there are many.

    Args:
        settings: The dataset.
        shards: Number of its shards.
        revision: Its revision.
    """
    commit = None if Path(str(settings.hub)).exists() else revision
    pieces = [HubPiece(str(settings.hub), settings.hub_config, settings.hub_split, commit, shard, shards) for shard in range(shards)]
    together = -(-shards // MOST_UNITS)
    return [tuple(pieces[begin : begin + together]) for begin in range(0, shards, together)]


def texts_of(unit: Unit, field: str, notes: Counter[str]) -> Iterator[str]:
    """Yields the texts of a unit, blank ones too; ``field`` and ``notes`` as for ``read_file``.

    Raises:
        UserError: as ``read_file``; places in messages are those of the whole file.
    """
    for piece in unit:
        if isinstance(piece, HubPiece):
            yield from shard_texts(piece, field, notes)
            continue
        path = Path(piece.path)
        if piece.whole:
            yield from read_file(path, field, notes)
            continue
        texts = _texts_between(path, piece, field, notes)
        while True:
            try:
                text = next(texts, None)
            except UserError:
                # a part does not know the number of its first line: reading from the beginning ends in the same error, with that number
                for _ in read_file(path, field):
                    pass
                raise
            if text is None:
                break
            yield text


def _texts_between(path: Path, piece: Piece, field: str, notes: Counter[str]) -> Iterator[str]:
    name = shown_path(path)
    if suffix_of(path) == _GROUPS:
        yield from parquet_texts(path, field, (piece.begin / piece.size, piece.end / piece.size))
        return
    for line in lines_between(path, piece.begin, piece.end):
        if isinstance(line, UserError):
            raise line
        if line.strip():
            row = parsed_line(line, name)
            if isinstance(row, UserError):
                raise row
            yield text_of_row(row, field, name, notes)


def rows_of(unit: Unit) -> Iterator[Row]:
    """Yields the conversations of a unit of whole files or shards."""
    for piece in unit:
        if isinstance(piece, HubPiece):
            yield from shard_rows(piece)
            continue
        path = Path(piece.path)
        assert piece.whole, "conversations are named by their line, so their files are not cut"
        yield from read_rows(path, COLUMNS, name=shown_path(path.name))
