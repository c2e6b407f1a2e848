"""Writing the GGUF container: metadata, tensor table, aligned data.

File, all little-endian: magic "GGUF", version u32 = 3, number of tensors u64, number of metadata entries u64; the entries (key, type
u32, value); the table (name, number of dimensions u32, dimensions u64 with the fastest first, type u32, offset u64 from the start of
the data); zeros up to a multiple of 32; the data, every tensor followed by zeros up to a multiple of 32. A string is its length u64
and UTF-8 bytes, an array its element type u32, length u64 and elements.

The ``gguf`` package writes the same bytes, tensor by tensor too (tests/qat/export/gguf/test_container.py compares); the tests use it as a
reference. It is not the writer because release 0.19.0 calls ``numpy.tofile``, which reports a full disk without its error number, so the
failure would look transient; opens files with "wb", which overwrites existing ones; and lacks Q2_0. It would save about 40 lines.

Source: ggml ``docs/gguf.md``; gguf-py ``gguf_writer.py``, ``constants.py``.
"""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

VERSION, ALIGNMENT = 3, 32

# ggml's enum gguf_type
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64 = 4, 5, 6, 7, 8, 9, 10


class TensorType(IntEnum):
    """Storage type of a tensor, with ggml's number."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    Q2_0 = 42


BLOCKS = {
    TensorType.F32: (1, 4),
    TensorType.F16: (1, 2),
    TensorType.BF16: (1, 2),
    TensorType.Q4_0: (32, 18),
    TensorType.Q4_1: (32, 20),
    TensorType.Q5_0: (32, 22),
    TensorType.Q5_1: (32, 24),
    TensorType.Q8_0: (32, 34),
    TensorType.Q2_0: (64, 18),
    TensorType.MXFP4: (32, 17),
    TensorType.TQ1_0: (256, 54),
    TensorType.TQ2_0: (256, 66),
    TensorType.Q2_K: (256, 84),
    TensorType.Q3_K: (256, 110),
    TensorType.Q4_K: (256, 144),
    TensorType.Q5_K: (256, 176),
    TensorType.Q6_K: (256, 210),
}
"""Type -> (elements per block along the row, bytes per block)."""

FILE_TYPES = {
    TensorType.F32: 0,
    TensorType.F16: 1,
    TensorType.Q4_0: 2,
    TensorType.Q4_1: 3,
    TensorType.Q8_0: 7,
    TensorType.Q5_0: 8,
    TensorType.Q5_1: 9,
    # llama.cpp's names of mixtures: Q2_K, Q3_K_S, Q4_K_S, Q5_K_S, Q6_K
    TensorType.Q2_K: 10,
    TensorType.Q3_K: 11,
    TensorType.Q4_K: 14,
    TensorType.Q5_K: 16,
    TensorType.Q6_K: 18,
    TensorType.BF16: 32,
    TensorType.TQ1_0: 36,
    TensorType.TQ2_0: 37,
    # llama.cpp has no other number for it than that of its mixture for experts
    TensorType.MXFP4: 38,
    TensorType.Q2_0: 41,
}
"""Type of most weights -> ``general.file_type``."""
MIX_FILE_TYPES = {
    "q2_k": 10,
    "q3_k_s": 11,
    "q3_k_m": 12,
    "q3_k_l": 13,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
}
"""Mixture (``qat/mixes.py``) -> ``general.file_type``."""


@dataclass(frozen=True)
class F32:
    """A metadata number stored as fp32 (a plain ``int`` is stored as u32, or as u64 if it needs to be)."""

    value: float


@dataclass(frozen=True)
class I32:
    """A metadata number stored as int32."""

    value: int


Value = str | bool | int | F32 | I32 | Sequence[str] | Sequence[int] | Sequence[F32]


@dataclass(frozen=True)
class TensorPlan:
    """A tensor of the file."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    """Row-major, as in PyTorch: the last dimension is contiguous. Its length is a multiple of the type's block."""
    make: Callable[[], NDArray[np.generic]]
    """Returns the data as a contiguous array; called when the tensor is written, so that only one tensor is in memory at a time."""

    @property
    def nbytes(self) -> int:
        """Bytes of the data, without padding."""
        elements, size = BLOCKS[self.type]
        return math.prod(self.shape) // elements * size


def write_gguf(file: Path, metadata: dict[str, Value], tensors: Sequence[TensorPlan]) -> None:
    """Write a new file with the tensors in the given order.

    Raises:
        ValueError: a value that no metadata type holds, a row that is no multiple of its block, or data of another size than planned.
    """
    # "x": an existing file is never overwritten
    with Path(file).open("xb") as handle:
        handle.write(header_bytes(metadata, tensors))
        for tensor in tensors:
            _write_data(handle, tensor)


def header_bytes(metadata: dict[str, Value], tensors: Sequence[TensorPlan]) -> bytes:
    """Return everything before the data, padded to the alignment."""
    # magic, version, number of tensors, number of metadata entries
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(key, value)]
    # of the tensor, from the start of the data
    offset = 0
    for tensor in tensors:
        if tensor.shape[-1] % BLOCKS[tensor.type][0]:
            raise ValueError(f"{tensor.name}: rows of {tensor.shape[-1]} are no multiple of a {tensor.type.name} block")
        parts.append(_string(tensor.name) + struct.pack("<I", len(tensor.shape)))
        # ggml lists the contiguous dimension first
        parts.append(struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)))
        parts.append(struct.pack("<IQ", tensor.type, offset))
        offset += tensor.nbytes + _padding(tensor.nbytes)
    header = b"".join(parts)
    # the data begins at a multiple of the alignment
    return header + bytes(_padding(len(header)))


def planned_file_bytes(metadata: dict[str, Value], tensors: Sequence[TensorPlan]) -> int:
    """Return the size in bytes of the file that ``write_gguf`` will write."""
    return len(header_bytes(metadata, tensors)) + sum(tensor.nbytes + _padding(tensor.nbytes) for tensor in tensors)


def _padding(size: int) -> int:
    return -size % ALIGNMENT


def _write_data(handle: BinaryIO, tensor: TensorPlan) -> None:
    data = np.ascontiguousarray(tensor.make())
    # the table in front has promised the offsets of all tensors
    if data.nbytes != tensor.nbytes:
        raise ValueError(f"{tensor.name}: {data.nbytes} bytes were made, {tensor.nbytes} planned")
    # the array's own memory: a copy as bytes would double that of a large tensor
    handle.write(data.reshape(-1).view(np.uint8).data)
    handle.write(bytes(_padding(tensor.nbytes)))


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Value) -> bytes:
    if isinstance(value, str | bool | int | F32 | I32):
        kind, body = _scalar(key, value)
        return struct.pack("<I", kind) + body
    items = [_scalar(key, item, element=True) for item in value]
    kinds = {kind for kind, _ in items}
    # an empty array would have no type of elements
    if len(kinds) > 1 or not items:
        raise ValueError(f"{key}: an array needs elements of one type")
    # array: its own type, the type of its elements, their number
    return struct.pack("<IIQ", _ARRAY, kinds.pop(), len(items)) + b"".join(body for _, body in items)


def _scalar(key: str, value: str | bool | int | F32 | I32, element: bool = False) -> tuple[int, bytes]:
    if isinstance(value, str):
        return _STRING, _string(value)
    # bool is an int, so it must be checked before the integers
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, F32):
        return _F32, struct.pack("<f", value.value)
    if isinstance(value, I32) and -(2**31) <= value.value < 2**31:
        return _I32, struct.pack("<i", value.value)
    if isinstance(value, I32):
        raise ValueError(f"{key}: int32 does not hold {value.value}")
    if element and -(2**31) <= value < 2**31:  # readers want token types as int32
        return _I32, struct.pack("<i", value)
    if 0 <= value < 2**32:
        return _U32, struct.pack("<I", value)
    if 0 <= value < 2**64:
        return _U64, struct.pack("<Q", value)
    raise ValueError(f"{key}: no metadata type holds {value!r}")
