"""Reads the GGUF container: metadata and tensor table, checked before any memory of a declared size is taken.

The file is not trusted: every count and length is compared with the bytes that follow. Tensor data is read on demand, by rows.
``qat.readers`` has its own reader on purpose: it verifies exports independently of this code.

Source: ggml ``docs/gguf.md``.
"""

import hashlib
import math
import mmap
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import UserError
from ..common.hash_cache import SETTLED_SECONDS
from .block_types import BLOCK_TYPES, BlockType

VERSIONS = (2, 3)
MOST_HEADER_BYTES = 2**28
MOST_KEYS = MOST_TENSORS = 2**16
MOST_ITEMS = 2**23
"""Most elements of an array in the metadata; the largest vocabularies have a few hundred thousand tokens."""
MOST_NAME_BYTES = 2**16
_REMEDY = "the file is damaged or not a GGUF model; fetch or convert it again"
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """An entry of the tensor table."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    """Row-major, as in PyTorch: the last dimension is contiguous."""
    begin: int
    """Position of its first byte in the file."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row (the last dimension)."""
        return self.shape[-1] // self.type.elements * self.type.nbytes

    @property
    def rows(self) -> int:
        """Number of rows: the product of all dimensions but the last."""
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the data, without padding."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class GgufFile:
    """A checked file."""

    path: Path
    size: int
    """Bytes of the file."""
    metadata: dict[str, Any] = field(repr=False)
    """Numbers, truth values, strings and lists of them."""
    tensors: dict[str, GgufTensor] = field(repr=False)
    """Tensors by name, in the order of the table."""
    header_sha256: str
    """Hex sha256 of everything before the data: of all that shapes, names and tokenizer depend on."""

    def row_blocks(self, tensor: GgufTensor, begin: int, end: int) -> NDArray[np.uint8]:
        """The blocks of rows ``begin`` to ``end`` of a tensor: uint8 [rows, blocks per row, bytes per block].

        Raises:
            UserError: the file has become shorter since it was opened, or cannot be read.
        """
        # only the rows that are asked for are read: a whole tensor may not fit
        count = (end - begin) * tensor.row_bytes
        try:
            data = np.fromfile(self.path, np.uint8, count, offset=tensor.begin + begin * tensor.row_bytes)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from error
        # fromfile returns fewer bytes at the end of the file without an error
        if data.size != count:
            raise UserError(f"{self.path}: {tensor.name} was cut off while the file was read; {_REMEDY}")
        return data.reshape(end - begin, -1, tensor.type.nbytes)

    def types(self) -> dict[str, int]:
        """Name of each storage type of the file -> number of its tensors, in the order of their appearance."""
        found: dict[str, int] = {}
        for tensor in self.tensors.values():
            found[tensor.type.name] = found.get(tensor.type.name, 0) + 1
        return found


def read_gguf(path: Path) -> GgufFile:
    """Read and check everything but the tensors' data; the result of a file that is unchanged is shared, so nobody may change it.

    Raises:
        UserError: the file is cut off, foreign, big-endian or of another version; a count or length exceeds the file; a name occurs twice;
            text is not UTF-8; a type is unknown; a tensor lies outside the file or over another one.
    """
    path = Path(path)
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    changed = max(stat.st_mtime_ns, stat.st_ctime_ns)
    # a plan opens a file several times, and a large vocabulary takes seconds; a second write within a tick of the clock would not show
    settled = time.time_ns() - changed > SETTLED_SECONDS * 1e9
    return _kept(path, (stat.st_dev, stat.st_ino, stat.st_size, changed)) if settled else _opened(path)


@lru_cache(maxsize=2)
def _kept(path: Path, identity: tuple[int, ...]) -> GgufFile:
    # the identity is in the key: a file that changed is read again
    return _opened(path)


def _opened(path: Path) -> GgufFile:
    try:
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            # magic, version and two counts
            if size < 24:
                raise _Damaged(f"it is cut off: {size} bytes are fewer than the smallest header")
            # mapped: a header is a small part of a large file
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _read(path, content, size)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except _Damaged as error:
        raise UserError(f"{path}: {error}; {_REMEDY}") from error


class _Damaged(Exception):  # noqa: N818 - becomes a UserError in read_gguf
    """A fault of the file, in words."""


class _Header:
    """Reads forward through the header, never beyond the file or ``MOST_HEADER_BYTES``."""

    def __init__(self, content: mmap.mmap, size: int) -> None:
        self.content, self.size, self.at = content, size, 0

    def take(self, count: int) -> bytes:
        begin, end = self.at, self.at + count
        if end > self.size:
            raise _Damaged(f"it is cut off: {count:,} bytes are needed at byte {begin:,}, the file has {self.size:,}")
        if end > MOST_HEADER_BYTES:
            raise _Damaged(f"its header is longer than {MOST_HEADER_BYTES:,} bytes")
        self.at = end
        return self.content[begin:end]

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def count(self, most: int, least_bytes: int, what: str) -> int:
        """A number of items that take at least ``least_bytes`` each."""
        count = self.number("Q")
        # compared before anything is made of it: a count of 2^60 would otherwise reserve memory
        if count > most or count * least_bytes > self.size - self.at:
            raise _Damaged(
                f"it declares {count:,} {what}; the {self.size - self.at:,} bytes that follow cannot hold them (at most {most:,})"
            )
        return count

    def text(self, what: str, most: int = MOST_HEADER_BYTES) -> str:
        raw = self.take(self.count(most, 1, f"bytes of {what}"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _Damaged(f"{what} is not UTF-8 text") from None

    def value(self, key: str) -> Any:
        kind = self.number("I")
        if kind == _ARRAY:
            return self._array(key)
        if kind == _STRING:
            return self.text(f"the value of {key!r:.200}")
        if kind not in _NUMBERS:
            raise _Damaged(f"the value of {key!r:.200} has the unknown type {kind}")
        return self.number(_NUMBERS[kind])

    def _array(self, key: str) -> list[Any]:
        kind = self.number("I")
        if kind == _STRING:
            what = f"a string of {key!r:.200}"
            # a string is its length and its bytes: at least 8
            return [self.text(what) for _ in range(self.count(MOST_ITEMS, 8, f"strings of {key!r:.200}"))]
        if kind not in _NUMBERS:
            raise _Damaged(f"the array {key!r:.200} has elements of type {kind}, which is unknown or nested")
        form = f"<{_NUMBERS[kind]}"
        count = self.count(MOST_ITEMS, struct.calcsize(form), f"numbers of {key!r:.200}")
        raw = self.take(count * struct.calcsize(form))
        return [value for (value,) in struct.iter_unpack(form, raw)]


def _read(path: Path, content: mmap.mmap, size: int) -> GgufFile:
    header = _Header(content, size)
    magic = header.take(4)
    if magic != b"GGUF":
        raise _Damaged(f"it begins with {magic!r}, not with b'GGUF'")
    version = header.number("I")
    if version not in VERSIONS:
        # a big-endian file shows as a version of 2^24 or more
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in (1, *VERSIONS):
            raise _Damaged(f"it is big-endian (version {swapped}); only little-endian files are read")
        raise _Damaged(f"it has version {version} of the format; versions {' and '.join(map(str, VERSIONS))} are read")
    # least sizes: a tensor has the length of its name, a count, a type and an offset; an entry the length of its key, a type and a byte
    tensor_count, key_count = header.count(MOST_TENSORS, 24, "tensors"), header.count(MOST_KEYS, 13, "metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = header.text("a metadata key", MOST_NAME_BYTES)
        if key in metadata:
            raise _Damaged(f"the metadata key {key!r:.200} occurs twice")
        metadata[key] = header.value(key)
    alignment = metadata.get("general.alignment", 32)
    # x & (x - 1) is 0 for powers of two alone
    if type(alignment) is not int or not 1 <= alignment <= 2**16 or alignment & (alignment - 1):
        raise _Damaged(f"general.alignment is {alignment!r:.100}, not a power of two up to 65,536")
    table = list(_table(header, tensor_count))
    # data begins at the next multiple of the alignment
    start = -(-header.at // alignment) * alignment
    return GgufFile(path, size, metadata, _placed(table, start, size), hashlib.sha256(content[: header.at]).hexdigest())


def _table(header: _Header, count: int) -> Iterator[GgufTensor]:
    """Entries with ``begin`` counted from the start of the data."""
    for _ in range(count):
        name = header.text("a tensor's name", MOST_NAME_BYTES)
        dimensions = header.number("I")
        if not 1 <= dimensions <= 4:
            raise _Damaged(f"tensor {name!r:.200} has {dimensions:,} dimensions; 1 to 4 are possible")
        # ggml lists the contiguous dimension first
        shape = tuple(reversed([header.number("Q") for _ in range(dimensions)]))
        kind, offset = header.number("I"), header.number("Q")
        if kind not in BLOCK_TYPES:
            raise _Damaged(f"tensor {name!r:.200} has the ggml type {kind}, which is unknown here")
        # as Python ints: a product of declared sizes cannot overflow before it is compared
        if not all(shape) or math.prod(shape) >= 2**60:
            raise _Damaged(f"tensor {name!r:.200} has the impossible shape {shape}")
        type_ = BLOCK_TYPES[kind]
        if shape[-1] % type_.elements:
            raise _Damaged(f"tensor {name!r:.200} has rows of {shape[-1]:,}, no multiple of a {type_.name} block of {type_.elements}")
        yield GgufTensor(name, type_, shape, offset)


def _placed(table: list[GgufTensor], start: int, size: int) -> dict[str, GgufTensor]:
    """The tensors with their places in the file; every byte belongs to one tensor at most."""
    tensors: dict[str, GgufTensor] = {}
    for entry in table:
        if entry.name in tensors:
            raise _Damaged(f"the tensor {entry.name!r:.200} occurs twice")
        # offsets of the table count from the start of the data
        tensors[entry.name] = placed = GgufTensor(entry.name, entry.type, entry.shape, start + entry.begin)
        if placed.begin + placed.nbytes > size:
            raise _Damaged(f"it is cut off: tensor {entry.name!r:.200} ends at byte {placed.begin + placed.nbytes:,} of {size:,}")
    end, before = start, ""
    # by place, to find two tensors over the same bytes
    for tensor in sorted(tensors.values(), key=lambda one: one.begin):
        if tensor.begin < end:
            raise _Damaged(f"tensor {tensor.name!r:.200} lies over {before!r:.200}")
        end, before = tensor.begin + tensor.nbytes, tensor.name
    return tensors
