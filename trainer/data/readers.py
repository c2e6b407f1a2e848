"""Documents out of local files: .txt (one document a file), .jsonl (one a line) and .parquet (one a row)."""

import difflib
import glob
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...models.errors import UserError

_JSON_NAMES = {dict: "an object", list: "a list", int: "a number", float: "a number", bool: "a truth value"}


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Files that the globs of ``data.files`` match: sorted within each pattern, patterns in their order, none twice.

    Raises: UserError for a pattern without files, a folder, or a suffix that cannot be read.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        place = Path(pattern).expanduser()
        if place.is_dir():
            raise UserError(f"data.files: {pattern!r} is a folder; name its files, for example {str(Path(pattern) / '*.txt')!r}")
        names = [str(place)] if place.exists() else sorted(glob.glob(str(place), recursive=True))
        files = [Path(name) for name in names if Path(name).is_file()]
        if not files:
            raise UserError(f"data.files: no file matches {pattern!r} (looked in {Path.cwd()}){_similar_file(place)}")
        for file in files:
            if file.suffix.lower() not in READERS:
                raise UserError(
                    f"data.files: {file} has a suffix that cannot be read; use {', '.join(READERS)} ({file.suffix or 'none'} given)"
                )
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _similar_file(place: Path) -> str:
    if glob.has_magic(str(place)) or not place.parent.is_dir():
        return ""
    close = difflib.get_close_matches(place.name, [other.name for other in place.parent.iterdir()], n=1)
    return f"; did you mean {str(place.parent / close[0])!r}?" if close else ""


def read_file(path: Path, field: str) -> Iterator[str]:
    """Documents of one file; ``field`` is the key or column of jsonl and parquet files.

    Raises: UserError naming the file (and line) that cannot be read, and the fields that are there when ``field`` is not.
    """
    try:
        yield from READERS[path.suffix.lower()](path, field)
    except OSError as error:
        raise UserError(f"data.files: {path} cannot be read ({error.strerror or error}); check the path and its permissions") from error


def missing_field(field: str, there: Iterable[str], where: str) -> UserError:
    """The error for a ``data.text_field`` that a row does not have."""
    names = list(there)
    close = difflib.get_close_matches(field, names, n=1)
    if not close and ("messages" in names or {"prompt", "completion"} <= set(names)):
        return UserError(f"data.text_field={field!r} is not in {where}; these are conversations: set data.kind: chat")
    hint = f"; did you mean {close[0]!r}?" if close else "; set data.text_field to the one that holds the text"
    return UserError(f"data.text_field={field!r} is not in {where}; fields there: {', '.join(names) or 'none'}{hint}")


def _read_txt(path: Path, field: str) -> Iterator[str]:
    yield _decode(path.read_bytes(), str(path))


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            text = _decode(line, where).strip()
            if text:
                yield _text_of_row(_parse(text, where), field, where)


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"data.files: {where} is not a JSON object ({error}); a .jsonl file has one whole object on each line") from error
    if not isinstance(row, dict):
        raise UserError(f'data.files: {where} is not a JSON object; write each line as {{"text": "..."}}')
    return row


def _text_of_row(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise missing_field(field, row, where)
    text = row[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"data.text_field={field!r} holds {_JSON_NAMES[type(text)]} in {where}, not text; name the field with the text")
    # JSON may escape half of a surrogate pair, which no tokenizer can encode
    return text.encode("utf-8", "replace").decode("utf-8")


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if field not in schema.names:
                raise missing_field(field, schema.names, str(path))
            check_text_column(schema.field(field).type, field, str(path))
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except pa.ArrowException as error:
        raise UserError(f"data.files: {path} is not a whole Parquet file ({str(error).splitlines()[0]}); make or fetch it again") from error


def check_text_column(kind: Any, field: str, where: str) -> None:
    """Raises: UserError when the Arrow type ``kind`` of a column is not text."""
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)):
        raise UserError(f"data.text_field={field!r} holds {kind} in {where}, not text; name the field with the text")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.files: {where} is not UTF-8 (byte {error.start}: {error.reason}); convert it, for example with iconv -f LATIN1 -t UTF-8"
        ) from error


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
"""How each suffix is read."""
