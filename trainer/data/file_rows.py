"""Reads rows from files of JSON lines, JSON arrays, CSV and Parquet, one at a time."""

import csv
import io
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ...models.common.errors import UserError
from .input_files import PACKED, Expansion, decode_text, encoding_of, file_kind, lines_of, opened, shown_path

Row = tuple[str, Mapping[str, Any] | UserError]
"""(place of the row for messages, the row or the error that it cannot be read)."""
_BATCH_ROWS = 1024


def read_rows(path: Path, columns: Collection[str] | None = None, *, name: str | None = None) -> Iterator[Row]:
    """Yields the rows of a file, each with its place. For a row that cannot be read the error is yielded.

    Args:
        path: A file with a suffix of ``input_files.ROWS``.
        columns: Columns to read from Parquet files; None = all.
        name: Name of the file in places; default: its path.

    Raises:
        UserError: the rest of the file cannot be read.
    """
    kind, name = file_kind(path), name or shown_path(path)
    if kind == ".parquet":
        yield from parquet_rows(path, columns, name=name)
        return
    with opened(path) as stream:
        if kind in (".csv", ".tsv"):
            yield from _csv_rows(stream, name, "\t" if kind == ".tsv" else ",")
        elif kind == ".json" or _starts_array(stream):
            yield from _json_values(decode_text(stream.read(), name), name)
        else:
            yield from _line_rows(stream, name)


def _starts_array(stream: BinaryIO) -> bool:
    """Whether a file that should hold one object per line is one JSON array."""
    # peek leaves the bytes in the stream, which may be compressed and could not be rewound cheaply
    head = stream.peek(64)[:64] if isinstance(stream, io.BufferedReader) else b""
    return head.decode(encoding_of(head), "ignore").lstrip().startswith("[")


def _line_rows(stream: BinaryIO, name: str) -> Iterator[Row]:
    for number, line in lines_of(stream, name):
        where = f"{name}:{number}"
        if isinstance(line, UserError):
            yield where, line
        elif line.strip():
            yield where, parsed_line(line, where)


def one_line_each(path: Path) -> bool:
    """Whether a file of JSON lines can be cut between any two of its lines: it is not packed, is UTF-8, and is not one array."""
    if path.suffix.lower() in PACKED:
        return False
    with opened(path) as stream:
        head = stream.peek(64)[:64] if isinstance(stream, io.BufferedReader) else b""
        return encoding_of(head) == "utf-8-sig" and not _starts_array(stream)


def lines_between(path: Path, begin: int, end: int) -> Iterator[str | UserError]:
    """Yields the lines that begin at the bytes [begin, end) of a file of ``one_line_each``; a line that is no text gives the error."""
    with opened(path) as stream:
        # from the byte before: a line begins at ``begin`` only behind a line end, and another line there is the part's before this one
        at = stream.seek(max(begin - 1, 0))
        at += len(stream.readline()) if begin else 0
        while at < end and (line := stream.readline()):
            at += len(line)
            try:
                yield decode_text(line, shown_path(path))
            except UserError as error:
                yield error


def parsed_line(line: str, where: str) -> Mapping[str, Any] | UserError:
    """The object that a line of JSON holds, or the error that it holds none; ``where`` is the line's place for messages."""
    try:
        row = json.loads(line.strip())
    except (ValueError, RecursionError) as error:
        return UserError(f"data.files: {where} is not a JSON object ({error}); a .jsonl file has one whole object on each line")
    return row if isinstance(row, dict) else UserError(f'data.files: {where} is not a JSON object; write each line as {{"text": "..."}}')


def _json_values(text: str, name: str) -> Iterator[Row]:
    """Yields the elements of an array, or concatenated objects, decoded one at a time."""
    decoder, at, number = json.JSONDecoder(), _next(text, 0), 0
    array = text[at : at + 1] == "["
    at = _next(text, at + 1) if array else at
    while at < len(text) and not (array and text[at] == "]"):
        number += 1
        where = f"{name}, item {number}"
        try:
            # one value at a time: the objects of a large array would take several times the memory of its text
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise UserError(f"data.files: {where} is not whole JSON ({error}); make or fetch the file again") from error
        yield where, value if isinstance(value, dict) else UserError(f"data.files: {where} is not a JSON object, but {str(value)[:40]!r}")
        at = _next(text, at)
        if array and text[at : at + 1] == ",":
            at = _next(text, at + 1)
        elif array and text[at : at + 1] != "]":
            raise UserError(f"data.files: {name} is not whole JSON (its array ends after item {number}); make or fetch the file again")


def _next(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _csv_rows(stream: BinaryIO, name: str, delimiter: str) -> Iterator[Row]:
    # the longest byte-order mark has four bytes
    head = stream.peek(4)[:4] if isinstance(stream, io.BufferedReader) else b""
    # the default of 128 KiB is less than many documents
    csv.field_size_limit(2**31 - 1)
    with io.TextIOWrapper(stream, encoding_of(head), newline="") as text:
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                where = f"{name}:{reader.line_num}"
                # DictReader collects surplus columns under None: text with an unquoted delimiter would lose its rest
                if None in row:
                    yield where, UserError(f"data.files: {where} has more columns than the header; quote text that holds {delimiter!r}")
                else:
                    yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(
                f"data.files: {name}:{reader.line_num} cannot be read ({error}); a .csv file has a header line, is UTF-8, and quotes text "
                "that holds commas, quotes or line ends"
            ) from error


def parquet_rows(
    path: Path, columns: Collection[str] | None = None, *, name: str | None = None, part: tuple[float, float] = (0.0, 1.0)
) -> Iterator[Row]:
    """Yields the rows of a Parquet file, without the nulls that its schema adds for missing keys.

    ``part``: begin and end of the share of its row groups that is read, [begin, end); rows are numbered from the first one read.

    Text stays dictionary-encoded until a row is read, so that a small file whose rows repeat one long text takes the memory of one row.
    """
    for where, row in _parquet_batches(path, columns, name or shown_path(path), part):
        yield where, without_nulls(row)


def _parquet_batches(
    path: Path, columns: Collection[str] | None, name: str, part: tuple[float, float]
) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # dictionary encoding can repeat one long text a million times in a small file
        guard = Expansion(path)
        with pq.ParquetFile(path) as plain:
            schema = plain.schema
            wanted = [given for given in plain.schema_arrow.names if columns is None or given in columns]
            leaves = [schema.column(i) for i in range(len(plain.schema))]
            texts = [leaf.path for leaf in leaves if leaf.logical_type.type == "STRING" and leaf.path.split(".")[0] in wanted]
        with pq.ParquetFile(path, read_dictionary=texts) as file:
            number, count = 0, file.num_row_groups
            # by number and not by place, so that shares that follow each other hold all groups once and in order
            groups = [group for group in range(count) if part[0] <= group / count < part[1]]
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups, columns=wanted):
                # lengths, indices and UTF-8 may be wrong in a damaged file, and reading them unchecked could crash the process
                batch.validate(full=True)
                for at in range(batch.num_rows):
                    number += 1
                    row = {given: batch.column(index)[at].as_py() for index, given in enumerate(batch.schema.names)}
                    guard.add(_characters(row))
                    yield f"{name}, row {number}", row
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"data.files: {name} is not a whole Parquet file ({_first_line(error)}); make or fetch it again") from error
    # pyarrow reports damaged files as OSError without a number; with a number it is the file system
    except OSError as error:
        if error.errno is None:
            raise UserError(f"data.files: {name} is not a whole Parquet file ({_first_line(error)}); make or fetch it again") from error
        raise UserError(f"data.files: {name} cannot be read ({error.strerror}); check the path and its permissions") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _characters(value: Any) -> int:
    """Number of characters of all texts in a nested value."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(_characters(each) for each in value.values())
    return sum(_characters(each) for each in value) if isinstance(value, list | tuple) else 0


def without_nulls(value: Any) -> Any:
    """A nested value without keys that are None: tables give every row the keys of all rows."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    return value
