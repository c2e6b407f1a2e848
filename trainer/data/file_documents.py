"""Reads documents from local files: plain text (one document per file), or one field of each row."""

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...models.common.errors import UserError
from .file_rows import parquet_rows, read_rows
from .input_files import PLAIN, decode_text, file_kind, opened, shown_path

HALF_PAIRS = "texts with half of a surrogate pair, which became '?'"
_JSON_NAMES = {dict: "an object", list: "a list", int: "a number", float: "a number", bool: "a truth value", bytes: "bytes"}
_CHAT_COLUMNS = ({"messages"}, {"conversations"}, {"prompt", "completion"}, {"instruction", "output"})


def read_file(path: Path, field: str, notes: Counter[str] | None = None) -> Iterator[str]:
    """Yields the documents of one file.

    Args:
        path: The file.
        field: Key or column of the text, in files of rows.
        notes: Counts replacements.

    Raises:
        UserError: the file or a line cannot be read, or ``field`` is missing; the message names the place, and the fields that exist.
    """
    if file_kind(path) in PLAIN:
        with opened(path) as stream:
            yield decode_text(stream.read(), shown_path(path))
    elif file_kind(path) == ".parquet":
        yield from parquet_texts(path, field)
    else:
        counts: Counter[str] = Counter() if notes is None else notes
        for where, row in read_rows(path):
            # documents stop at the first row that cannot be read; conversations count such rows instead (``chats``)
            if isinstance(row, UserError):
                raise row
            yield text_of_row(row, field, where, counts)


def missing_field(field: str, there: Iterable[str], where: str) -> UserError:
    """The error for a ``data.text_field`` that a row does not have."""
    names = list(there)
    close = difflib.get_close_matches(field, names, n=1)
    if not close and any(columns <= set(names) for columns in _CHAT_COLUMNS):
        return UserError(f"data.text_field={field!r} is not in {where}; these are conversations: set data.kind: chat")
    hint = f"; did you mean {close[0]!r}?" if close else "; set data.text_field to the one that holds the text"
    return UserError(f"data.text_field={field!r} is not in {where}; fields there: {', '.join(names) or 'none'}{hint}")


def text_of_row(row: Mapping[str, Any], field: str, where: str, notes: Counter[str]) -> str:
    """The text in ``field`` of a row; ``where`` is the row's place for messages, and ``notes`` counts replacements.

    Raises:
        UserError: the field is missing, or is no text.
    """
    if field not in row:
        raise missing_field(field, row, where)
    text = row[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"data.text_field={field!r} holds {_JSON_NAMES[type(text)]} in {where}, not text; name the field with the text")
    return whole_text(text, notes)


def whole_text(text: str, notes: Counter[str]) -> str:
    """``text`` with '?' for halves of surrogate pairs, which JSON can escape and no tokenizer can encode."""
    try:
        # nearly all texts pass, and checking is cheaper than replacing
        text.encode()
    except UnicodeEncodeError:
        notes[HALF_PAIRS] += 1
        return text.encode("utf-8", "replace").decode("utf-8")
    return text


def parquet_texts(path: Path, field: str, part: tuple[float, float] = (0.0, 1.0)) -> Iterator[str]:
    """Yields the texts in a column of a Parquet file; ``part`` as for ``parquet_rows``.

    Raises:
        UserError: as ``read_file``.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            names = schema.names
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        # a damaged file gets its message when its rows are read below
        schema, names = None, []
    if schema is not None:
        if field not in names:
            raise missing_field(field, names, shown_path(path))
        check_text_column(schema.field(field).type, field, shown_path(path))
    # only this column is read from disk
    for _, row in parquet_rows(path, [field], part=part):
        yield row.get(field, "") if isinstance(row, Mapping) else ""


def check_text_column(kind: Any, field: str, where: str) -> None:
    """Raises UserError if the Arrow type ``kind`` of a column is not text."""
    import pyarrow.types as types

    # repeated texts are often stored as a dictionary of values
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)):
        raise UserError(f"data.text_field={field!r} holds {kind} in {where}, not text; name the field with the text")
