"""An independent reader of GGUF files, in numpy: header, metadata, tensor table, and tensors as fp32.

It shares no code with the writer (``export/gguf/``). The file is not trusted: every count and length is compared with the bytes in the file
before memory of that size is allocated. ``gguf_model.py`` gives the tensors their transformers names.

Source of the format: ggml ``docs/gguf.md``; of the blocks: ggml ``ggml-common.h`` and ``ggml-quants.c`` (dequantize_row_*).
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ...models.common.errors import UserError
from .gguf_mxfp4 import decode_mxfp4
from .gguf_super_blocks import SUPER_TYPES, decode_super_blocks
from .gguf_ternary import TERNARY_TYPES, ternary_fields
from .tensors import Decoded

MAX_HEADER_BYTES = 1 << 28
MAX_ENTRIES = 1 << 16
"""Largest number of metadata entries, and of tensors."""
MAX_ITEMS = 1 << 23
"""Largest number of elements in a metadata array."""
# Type number of a metadata value -> its struct code (ggml's enum gguf_type).
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# ggml type: (name, elements of a block, bytes of a block)
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 42: ("Q2_0", 64, 18),
}  # fmt: skip
_WITH_MINIMUM = ("Q4_1", "Q5_1")
_REMEDY = "the file is damaged or not GGUF; fetch or export it again"


@dataclass(frozen=True)
class GgufTensor:
    """An entry of the tensor table."""

    name: str
    type: str
    """F32, F16, BF16, Q2_0, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, TQ1_0, TQ2_0 or MXFP4."""
    shape: tuple[int, ...]
    """Row-major: the last dimension is contiguous."""
    begin: int
    """Position of its first byte in the file."""
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """A checked file; tensors are read on access."""

    path: Path
    metadata: dict[str, Any]
    """Numbers, truth values and strings; arrays of numbers are ndarrays, arrays of strings lists."""
    tensors: dict[str, GgufTensor]
    """Tensors by name, in the order of the table."""

    def decode(self, name: str) -> Decoded:
        """Decodes a tensor of blocks; scales are [out, in / 32], or [out, in / 64] for Q2_0, [out, in / 256] for TQ1_0 and TQ2_0.

        Codes of Q4_1 and Q5_1 are shifted like those of Q4_0 and Q5_0, and their minimums are left out. Codes of Q2_0 are -1 to 2.
        The "scales" of Q2_K to Q6_K are all numbers of the blocks but their codes. Codes of MXFP4 are twice the floats.

        Raises:
            UserError: a scale or value is not finite, or a scale is zero although the block's codes are not.
        """
        tensor = self.tensors[name]
        blocks = self._blocks(tensor)
        if tensor.type in SUPER_TYPES:
            values, codes, numbers = decode_super_blocks(tensor.type, blocks)
            # NaN and infinite scales show in the values: a code that is multiplied with one gives NaN or infinity
            self._check_finite(name, values)
            return Decoded(values.reshape(tensor.shape), codes.reshape(tensor.shape), numbers.reshape(*tensor.shape[:-1], -1))
        if tensor.type == "MXFP4":
            codes, scales = decode_mxfp4(blocks)
            # the exponent 255 is NaN, as are the values
            values = codes.astype(np.float32) * scales
            self._check_finite(name, values)
            return Decoded(values.reshape(tensor.shape), codes.reshape(tensor.shape), scales.reshape(*tensor.shape[:-1], -1))
        if tensor.type in _WITH_MINIMUM:
            # two fp16, d and m, come first
            scales = self._halves(tensor, blocks, 0)
            fields = _fields(tensor.type, blocks[:, 4:])
            codes = fields - _MIDDLES[tensor.type]
            values = fields.astype(np.float32) * scales + self._halves(tensor, blocks, 2)
        else:
            # one fp16, d, comes first, but last in ternary blocks
            last = tensor.type in TERNARY_TYPES
            scales = self._halves(tensor, blocks, blocks.shape[1] - 2 if last else 0)
            packed = blocks[:, :-2] if last else blocks[:, 2:]
            codes = packed.view(np.int8) if tensor.type == "Q8_0" else _fields(tensor.type, packed) - _MIDDLES[tensor.type]
            if (codes[scales[:, 0] == 0] != 0).any():
                raise UserError(f"{self.path}: {name} has a block with scale 0 whose codes are not; {_REMEDY}")
            values = codes.astype(np.float32) * scales
        self._check_finite(name, values)
        return Decoded(values.reshape(tensor.shape), codes.reshape(tensor.shape), scales.reshape(*tensor.shape[:-1], -1))

    def read(self, name: str) -> NDArray[np.float32]:
        """A tensor as fp32: the exact stored values, or codes times scales.

        Raises:
            UserError: a value or scale is not finite.
        """
        tensor = self.tensors[name]
        if tensor.type not in ("F32", "F16", "BF16"):
            return self.decode(name).weight
        values = self._floats(tensor)
        self._check_finite(name, values)
        return values.reshape(tensor.shape)

    def _check_finite(self, name: str, values: NDArray[np.float32]) -> None:
        if not np.isfinite(values).all():
            raise UserError(f"{self.path}: {name} holds NaN or infinite values; {_REMEDY}")

    def _blocks(self, tensor: GgufTensor) -> NDArray[np.uint8]:
        return self._raw(tensor).reshape(-1, next(size for kind, _, size in _TYPES.values() if kind == tensor.type))

    def _raw(self, tensor: GgufTensor) -> NDArray[np.uint8]:
        data = np.fromfile(self.path, np.uint8, tensor.nbytes, offset=tensor.begin)
        # the file was checked when it was opened, and may have changed since
        if data.nbytes != tensor.nbytes:
            raise UserError(f"{self.path}: {tensor.name} was cut off while the file was read")
        return data

    def _halves(self, tensor: GgufTensor, blocks: NDArray[np.uint8], start: int) -> NDArray[np.float32]:
        """The fp16 at byte ``start`` of every block: fp32 [blocks, 1]."""
        numbers = np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)
        if not np.isfinite(numbers).all():
            raise UserError(f"{self.path}: {tensor.name} has a scale that is not finite; {_REMEDY}")
        return numbers

    def _floats(self, tensor: GgufTensor) -> NDArray[np.float32]:
        raw = self._raw(tensor)
        if tensor.type == "BF16":  # the upper half of the same number in fp32
            return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
        return raw.view("<f4" if tensor.type == "F32" else "<f2").astype(np.float32)


_MIDDLES = {
    "TQ1_0": np.int8(1),
    "TQ2_0": np.int8(1),
    "Q2_0": np.int8(1),
    "Q4_0": np.int8(8),
    "Q4_1": np.int8(8),
    "Q5_0": np.int8(16),
    "Q5_1": np.int8(16),
}
"""The stored value that means zero, in blocks without a minimum."""


def _fields(form: str, packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Unpacks the packed bytes [blocks, bytes] of each block into one unsigned number per weight."""
    if form in TERNARY_TYPES:
        return ternary_fields(form, packed)
    if form == "Q2_0":  # four to a byte, the first lowest
        return (
            np.stack([packed >> np.uint8(shift) & np.uint8(3) for shift in (0, 2, 4, 6)], axis=2).reshape(len(packed), -1).astype(np.int8)
        )
    high = 4 if form.startswith("Q5") else 0
    low = packed[:, high:]
    # a block of 32: the low halves of the bytes are its first 16 weights, the high halves the others
    fields = np.concatenate([low % 16, low // 16], axis=1)
    if high:  # bit j of a little-endian number is the fifth bit of weight j
        number = np.ascontiguousarray(packed[:, :high]).view("<u4")
        fields = fields + np.uint8(16) * ((number >> np.arange(32, dtype=np.uint32)) & 1).astype(np.uint8)
    return fields.astype(np.int8)


def read_gguf(path: Path) -> GgufFile:
    """Reads and checks everything but the tensors' data.

    Raises:
        UserError: the file is foreign, of another version or truncated; counts or lengths exceed the file; keys or names occur twice; text
            is not UTF-8; types are unknown; tensors overlap, leave gaps or exceed the file; or padding is not zero.
    """
    path = Path(path)
    try:
        with path.open("rb") as handle:
            return _parse(path, handle, os.fstat(handle.fileno()).st_size)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: {error}; {_REMEDY}") from error


def _parse(path: Path, handle: BinaryIO, size: int) -> GgufFile:
    cursor = _Cursor(handle, size)
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with 'GGUF'")
    # version 3 differs from 2 only in that big-endian files exist
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"version {version} of the format is unknown (2 and 3 are read; a big-endian file has another first byte)")
    # the fewest bytes of an entry: lengths, counts, type and offset of a tensor; key length, type and one byte of metadata
    tensor_count, entry_count = cursor.count("Q", MAX_ENTRIES, 24, "tensors"), cursor.count("Q", MAX_ENTRIES, 13, "metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.string("a metadata key", 1 << 16)
        if key in metadata:
            raise ValueError(f"the metadata key {key!r:.200} occurs twice")
        metadata[key] = cursor.value(key)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r:.100}, not a power of two from 8 to 65536")
    entries = [_tensor_entry(cursor) for _ in range(tensor_count)]
    tensors = _placed(cursor, entries, alignment)
    return GgufFile(path, metadata, tensors)


class _Cursor:
    """Reads forward through the header and never past the end of the file."""

    def __init__(self, handle: BinaryIO, size: int) -> None:
        self.handle, self.size, self.at = handle, size, 0

    def take(self, length: int) -> bytes:
        # the limit on headers bounds the memory for metadata, however large the file is
        if self.at + length > min(self.size, MAX_HEADER_BYTES):
            raise ValueError(f"truncated: {length:,} bytes are needed at byte {self.at:,} of {self.size:,}")
        self.at += length
        data = self.handle.read(length)
        # the file has become shorter since its size was asked
        if len(data) != length:
            raise ValueError(f"truncated at byte {self.at:,}")
        return data

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def count(self, form: str, limit: int, least_bytes: int, what: str) -> int:
        """Reads a number of items with at least ``least_bytes`` each, and checks that the rest of the file can hold them."""
        # compared before anything of that size is allocated: the file is not trusted
        value = self.number(form)
        if value > limit or value * least_bytes > self.size - self.at:
            raise ValueError(f"it claims {value:,} {what}, more than the {self.size - self.at:,} bytes that follow can hold or {limit:,}")
        return value

    def string(self, what: str, limit: int = 1 << 26) -> str:
        raw = self.take(self.count("Q", limit, 1, f"bytes of {what}"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{what} is not UTF-8") from None

    def value(self, key: str) -> Any:
        kind = self.number("I")
        if kind == _STRING:
            return self.string(f"{key!r:.200}")
        if kind != _ARRAY:
            return self._scalar(key, kind)
        kind = self.number("I")
        if kind == _STRING:
            return [self.string(f"{key!r:.200}") for _ in range(self.count("Q", MAX_ITEMS, 8, f"strings in {key!r:.200}"))]
        # arrays of arrays too: the format has them, no model does
        if kind not in _SCALARS:
            raise ValueError(f"the array {key!r:.200} has elements of the unknown type {kind}")
        width = struct.calcsize("<" + _SCALARS[kind])
        items = self.count("Q", MAX_ITEMS, width, f"numbers in {key!r:.200}")
        return np.frombuffer(self.take(items * width), np.dtype(_SCALARS[kind]).newbyteorder("<"))

    def _scalar(self, key: str, kind: int) -> Any:
        if kind not in _SCALARS:
            raise ValueError(f"the value of {key!r:.200} has the unknown type {kind}")
        return self.number(_SCALARS[kind])


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, row-major shape, ggml type, offset)."""
    name = cursor.string("a tensor name", 1 << 10)
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= 4:
        raise ValueError(f"tensor {name!r:.200} has {dimensions:,} dimensions, 1 to 4 are possible")
    # the file lists the contiguous dimension first
    shape = tuple(reversed([cursor.number("Q") for _ in range(dimensions)]))
    # beyond, a size in bytes would exceed 64 bits
    if not all(shape) or math.prod(shape) >= 1 << 62:
        raise ValueError(f"tensor {name!r:.200} has the impossible shape {shape}")
    return name, shape, cursor.number("I"), cursor.number("Q")


def _placed(cursor: _Cursor, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, GgufTensor]:
    """The tensor table with positions in the file. Checks that the data has no gaps except zeros up to the alignment."""
    # the data begins at the next multiple of the alignment
    start = cursor.at + -cursor.at % alignment
    # a file of metadata alone may end without padding
    if entries:
        _check_zeros(cursor, cursor.at, start, "the header")
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise ValueError(f"the tensor {name!r:.200} occurs twice")
        if kind not in _TYPES:
            known = ", ".join(form for form, _, _ in _TYPES.values())
            raise ValueError(f"tensor {name!r:.200} has the ggml type {kind}; this reader knows {known}")
        form, elements, size = _TYPES[kind]
        if shape[-1] % elements:
            raise ValueError(f"tensor {name!r:.200} ({form}) has rows of {shape[-1]:,}, not a multiple of {elements}")
        # whole blocks, because rows are multiples of a block
        nbytes = math.prod(shape) // elements * size
        if start + offset + nbytes > cursor.size:
            raise ValueError(f"truncated: tensor {name!r:.200} ends at byte {start + offset + nbytes:,} of {cursor.size:,}")
        tensors[name] = GgufTensor(name, form, shape, start + offset, nbytes)
    # in the order of their bytes: neither an overlap nor a byte between two tensors may hide anything
    position, before = start, "the header"
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.begin):
        if tensor.begin != position:
            fault = "overlaps" if tensor.begin < position else "leaves a hole behind"
            raise ValueError(f"tensor {tensor.name!r:.200} {fault} {before}: it begins at {tensor.begin:,}, expected {position:,}")
        end = tensor.begin + tensor.nbytes
        position, before = end + -end % alignment, f"tensor {tensor.name!r:.200}"
        # the last tensor may lack its padding
        _check_zeros(cursor, end, min(position, cursor.size), before)
    if cursor.size > position:
        raise ValueError(f"{cursor.size - position:,} bytes after {before} belong to no tensor")
    return tensors


def _check_zeros(cursor: _Cursor, begin: int, end: int, before: str) -> None:
    if end > cursor.size:
        raise ValueError(f"truncated after {before}")
    cursor.handle.seek(begin)
    if any(cursor.handle.read(end - begin)):
        raise ValueError(f"the padding after {before} is not zero")
