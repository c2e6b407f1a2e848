"""A strict reader of safetensors headers: it accepts only files that every reader interprets in the same way.

The safetensors library accepts duplicate keys (the format forbids them; readers then disagree on which tensor counts) and any
tensor name. Here everything is checked before a byte of data is used: header size and JSON, names, dtypes, sizes, and that the
tensors cover the file's data exactly, without overlap, hole, truncation or trailing bytes.
Source of the format: https://github.com/huggingface/safetensors (section "Format").
"""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import UserError

# far more than models need; the library's own limit is 100 MB
MAX_HEADER_BYTES = 16_000_000
MAX_DIMENSIONS = 64
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,511}")
_REMEDY = "the file is damaged or not safetensors; fetch or export it again"


@dataclass(frozen=True)
class TensorInfo:
    """Place of one tensor: ``begin`` and ``end`` are byte offsets from ``Header.data_start``."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header: tensors in the order of their bytes, free-form metadata, and the byte offset of the data in the file."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; the tensors' data is not read.

    Raises:
        UserError: the message names the file and the fault: truncated, foreign, a header above 16 MB, bad JSON, duplicate keys, bad names,
            unknown dtypes, sizes that are not shape x dtype, offsets that overlap, leave holes or lie outside the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            # the file: 8 bytes with the header's length, the header (JSON), the data
            length = int.from_bytes(handle.read(8), "little")
            # after reading: fewer than eight bytes give a number all the same
            if size < 8:
                raise UserError(f"{path}: {size} bytes are too few for a safetensors file; {_REMEDY}")
            # before reading: a damaged length could ask for exabytes
            if length > MAX_HEADER_BYTES:
                raise UserError(f"{path}: the header claims {length:,} bytes, more than the {MAX_HEADER_BYTES:,} allowed; {_REMEDY}")
            if 8 + length > size:
                raise UserError(f"{path}: truncated: the header needs {8 + length:,} bytes, the file has {size:,}; {_REMEDY}")
            raw = handle.read(length)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeError as error:
        raise UserError(f"{str(path)!r:.300} is not a valid file name") from error
    try:
        # the data begins after eight bytes and the header
        return _parse(raw, size - 8 - length)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}; {_REMEDY}") from error


def _parse(raw: bytes, data_bytes: int) -> Header:
    if not raw.startswith(b"{"):
        raise ValueError("the header is not a JSON object")
    # Python's reader accepts duplicate keys, NaN and Infinity unless these two hooks refuse them
    fields = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    metadata = fields.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must map strings to strings")
    tensors = {name: _tensor(name, entry) for name, entry in fields.items()}
    # the layout check below walks through the file once, in the order of bytes
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_layout(tensors, data_bytes)
    return Header(tensors=tensors, metadata=metadata, data_start=8 + len(raw))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"the header has the key {key!r:.200} twice")
        seen[key] = value
    return seen


def _no_constant(name: str) -> None:
    raise ValueError(f"the header holds {name}, which is not JSON")


def _sizes(value: Any) -> bool:
    # type, not isinstance: true and false are ints in Python
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def _tensor(name: str, entry: Any) -> TensorInfo:
    # a narrow alphabet: names appear in messages and in the files of other formats
    if not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"the tensor name {name!r:.200} is not allowed (letters, digits and _ . : / - only, no '..', no leading '/')")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of tensor {name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r:.100}")
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has the impossible shape {shape!r:.100}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name!r} has the impossible data_offsets {offsets!r:.100}")
    # in bits, because F4 and F6 elements are smaller than a byte
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise ValueError(f"the size of tensor {name!r} ({dtype} {shape!r:.100}) is not the {offsets[1] - offsets[0]:,} bytes it is given")
    return TensorInfo(dtype=dtype, shape=tuple(shape), begin=offsets[0], end=offsets[1])


def _check_layout(tensors: dict[str, TensorInfo], data_bytes: int) -> None:
    # one walk finds holes, overlaps and bytes beyond the end
    position = 0
    for name, info in tensors.items():
        if info.end > data_bytes:
            raise ValueError(f"truncated: tensor {name!r} ends at data byte {info.end:,}, the file has {data_bytes:,}")
        # bytes that belong to no tensor, or to two, could hide data from some readers
        if info.begin != position:
            fault = "overlaps the tensor before it" if info.begin < position else "leaves a hole before it"
            raise ValueError(f"tensor {name!r} {fault} (begins at {info.begin:,}, expected {position:,})")
        position = info.end
    if position != data_bytes:
        raise ValueError(f"{data_bytes - position:,} bytes after the last tensor belong to none")
