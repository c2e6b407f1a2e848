"""Finds files of text by name, glob or folder, and reads their bytes, decompressed, up to a limit."""

import bz2
import codecs
import difflib
import glob
import gzip
import io
import lzma
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ...models.common.errors import UserError
from ...models.common.terminal_text import printable_line

PLAIN = (".txt", ".text", ".md")
"""Suffixes of files with one document per file."""
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Suffixes of files with one document or conversation per row."""
PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes of compression; they may follow all suffixes but .parquet, which is compressed inside."""
READABLE = f"{', '.join((*PLAIN, *ROWS))}, and packed ({', '.join(PACKED)})"
MOST_EXPANSION = 1000
MOST_EXPANDED_BYTES = 2**30
"""A file that unpacks to more than this and to more than ``MOST_EXPANSION`` times its size is refused: it is not real text."""
# found in most folders of data, and not what anyone wants to train on; named directly they are read
_NOT_TEXT = re.compile(r"(readme|license|licence|notice|changelog)\b.*", re.IGNORECASE)
# reading a pipe would block, and its text is gone after the first pass
_SPECIAL: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def shown_path(path: Path | str) -> str:
    """A file's name for printing and JSON: bytes that are not UTF-8, and control characters, are escaped as ``\\xff``."""
    return printable_line(os.fspath(path))


def suffix_of(path: Path) -> str:
    """The suffix that decides how a file is read, in lower case, with that of its compression ('.jsonl.gz')."""
    last = path.suffix.lower()
    return Path(path.stem).suffix.lower() + last if last in PACKED else last


def file_kind(path: Path) -> str:
    """``suffix_of`` without the compression."""
    return "." + suffix_of(path).split(".")[1] if path.suffix else ""


def is_readable(path: Path) -> bool:
    """Whether files of this name can be read."""
    suffix, kind = suffix_of(path), file_kind(path)
    return kind in (*PLAIN, *ROWS) and (suffix == kind or kind != ".parquet")


def find_files(patterns: Sequence[str], passed: Counter[str] | None = None) -> list[Path]:
    """The files of the names, globs and folders in ``data.files``: in the order of the patterns, sorted within each, none twice.

    A folder means all readable files in it and below, which must be of one kind; hidden files, READMEs and licenses are skipped.

    Args:
        patterns: Names, globs and folders.
        passed: Counts files in folders that are not read, by reason.

    Raises:
        UserError: a pattern has no files, names a pipe or device, or a suffix cannot be read.
    """
    counts: Counter[str] = Counter() if passed is None else passed
    # resolved path -> path as given: links and overlapping patterns must not read a file twice
    found: dict[Path, Path] = {}
    for pattern in patterns:
        place = Path(pattern).expanduser()
        if place.is_dir():
            files = _files_of_folder(place, counts)
        else:
            _refuse_special(place)
            names = [str(place)] if place.exists() else sorted(glob.glob(str(place), recursive=True))
            files = [Path(name) for name in names if Path(name).is_file()]
        if not files:
            raise UserError(
                f"data.files: no file matches {shown_path(pattern)!r} (looked in {shown_path(Path.cwd())}){_hint(pattern, place)}"
            )
        for file in files:
            if not is_readable(file):
                raise UserError(
                    f"data.files: {shown_path(file)} has a suffix that cannot be read; use {READABLE} ({suffix_of(file) or 'none'} given)"
                )
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _files_of_folder(folder: Path, passed: Counter[str]) -> list[Path]:
    files: list[Path] = []
    for place, inner, names in os.walk(folder):
        # in place: os.walk enters the folders that are left in this list
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in names:
            file = Path(place, name)
            if name.startswith(".") or _NOT_TEXT.fullmatch(name) or not is_readable(file) or not file.is_file():
                passed["files in folders that are not text"] += 1
            else:
                files.append(file)
            if name.endswith(".arrow"):
                raise UserError(
                    f"data.files: {shown_path(place)} holds a dataset as datasets.save_to_disk writes it; write it as Parquet first: "
                    "datasets.load_from_disk(FOLDER).to_parquet('text.parquet')"
                )
    # kinds differ in what a document is (a file or a row), so a mixture in one folder is most likely a mistake
    kinds = Counter(file_kind(file) for file in files)
    if len(kinds) > 1:
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        example = str(folder / "**" / f"*{kinds.most_common(1)[0][0]}*")
        raise UserError(f"data.files: {shown_path(folder)} holds files of several kinds ({listed}); name the ones to read: {example!r}")
    if not files:
        raise UserError(f"data.files: the folder {shown_path(folder)} holds no file that can be read; use {READABLE}")
    # by parts and not by text, in which "a-b" comes before "a/b": the files of a folder stay together
    return sorted(files, key=lambda file: file.relative_to(folder).parts)


def _refuse_special(place: Path) -> None:
    try:
        mode = place.stat().st_mode
    except OSError:
        return
    for is_it, name in _SPECIAL:
        if is_it(mode):
            raise UserError(
                f"data.files: {shown_path(place)} is {name}, which cannot be read more than once; write its text to a file first"
            )


def _hint(pattern: str, place: Path) -> str:
    if "://" in pattern:
        return "; this is an address: download it, or give a hub dataset by data.hub (--hub)"
    if glob.has_magic(str(place)):
        return ""
    if place.parent.is_dir():
        close = difflib.get_close_matches(place.name, [other.name for other in place.parent.iterdir()], n=1)
        if close:
            return f"; did you mean {shown_path(place.parent / close[0])!r}?"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", pattern) and not is_readable(place):
        return "; a dataset of the Hugging Face hub goes to data.hub (--hub)"
    return ""


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens the decompressed bytes of a file.

    Raises:
        UserError: the file is incomplete, unpacks to more than the limit, or cannot be read.
    """
    packing = path.suffix.lower()
    try:
        with path.open("rb") as file:
            if packing not in PACKED:
                yield file
                return
            # buffered, because the readers of lines and of byte-order marks need peek
            with io.BufferedReader(_Bounded(_unpacked(file, packing), path)) as stream:
                yield stream
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _not_whole(path, packing, error) from error
    except OSError as error:
        # bz2 and zstd report damaged data by an OSError without a number
        if error.errno is None:
            raise _not_whole(path, packing, error) from error
        raise UserError(f"data.files: {shown_path(path)} cannot be read ({error.strerror}); check the path and its permissions") from error


def _not_whole(path: Path, packing: str, error: Exception) -> UserError:
    return UserError(f"data.files: {shown_path(path)} is not a whole {packing} file ({error}); make or fetch it again")


def _unpacked(file: BinaryIO, packing: str) -> Any:
    if packing == ".gz":
        return gzip.GzipFile(fileobj=file)
    if packing == ".bz2":
        return bz2.BZ2File(file)
    if packing == ".xz":
        return lzma.LZMAFile(file)
    import pyarrow as pa

    if not pa.Codec.is_available("zstd"):
        raise UserError("data.files: this pyarrow cannot read .zst files; unpack them (unzstd FILE), or install pyarrow from its wheel")
    return pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")


class _Bounded(io.RawIOBase):
    """Decompressed bytes; raises UserError once they exceed the limit for the file."""

    def __init__(self, source: Any, path: Path) -> None:
        self._source = source
        self._guard = Expansion(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # counted while reading, before the text is collected: a bomb is found after the limit and not after the memory is full
        data = self._source.read(len(buffer))
        self._guard.add(len(data))
        buffer[: len(data)] = data
        return len(data)


class Expansion:
    """Counts the bytes that come out of a file, and refuses a file with far too many for its size (a decompression bomb)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._most = max(MOST_EXPANDED_BYTES, MOST_EXPANSION * path.stat().st_size)
        self._seen = 0

    def add(self, size: int) -> None:
        """Counts ``size`` more bytes; raises UserError if there are too many."""
        self._seen += size
        if self._seen > self._most:
            raise UserError(
                f"data.files: {shown_path(self._path)} ({self._path.stat().st_size:,} bytes) unpacks to more than {self._most:,} bytes, "
                "far more than text can be compressed; unpack it by other means and inspect it"
            )


def encoding_of(head: bytes) -> str:
    """The encoding given by the byte-order mark in a file's first bytes; UTF-8 without one."""
    # UTF-32 first: its little-endian mark begins with that of UTF-16
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def decode_text(data: bytes, where: str) -> str:
    """Decodes ``data`` by its byte-order mark, or as UTF-8.

    Raises:
        UserError: the text has another encoding.
    """
    encoding = encoding_of(data[:4])
    # such text is valid UTF-8 with a zero after every letter, so decoding alone would not fail
    if encoding == "utf-8-sig" and data[:4096].count(0) > len(data[:4096]) // 4:
        raise UserError(
            f"data.files: {where} has many zero bytes, as UTF-16 without a byte-order mark or a binary file; convert it, for example with "
            "iconv -f UTF-16LE -t UTF-8"
        )
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        what = "UTF-8" if encoding == "utf-8-sig" else encoding.upper()
        raise UserError(
            f"data.files: {where} is not {what} (byte {error.start}: {error.reason}); convert it, for example with iconv -f LATIN1 -t UTF-8"
        ) from error


def lines_of(stream: BinaryIO, where: str) -> Iterator[tuple[int, str | UserError]]:
    """Yields (number, text) of each line; a line that cannot be decoded gives (number, error)."""
    # UTF-16 and UTF-32 need a decoder over line ends, since b"\n" occurs inside other characters; UTF-8 can be cut into lines as bytes, and
    # then a damaged line spoils only itself
    encoding = encoding_of(stream.peek(4)[:4] if isinstance(stream, io.BufferedReader) else b"")
    if encoding != "utf-8-sig":
        with io.TextIOWrapper(stream, encoding, newline="\n") as text:
            try:
                yield from enumerate(text, 1)
            except UnicodeDecodeError as error:
                raise UserError(f"data.files: {where} is not {encoding.upper()} throughout ({error.reason}); make it again") from error
        return
    for number, line in enumerate(stream, 1):
        try:
            yield number, decode_text(line, f"{where}:{number}")
        except UserError as error:
            yield number, error
