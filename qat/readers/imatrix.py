"""Reads importance matrices of llama.cpp: for each linear the mean square of each of its inputs on some text.

Two forms. The older file, little-endian: number of entries i32; of each the length of its name i32, the name, calls i32, numbers i32, and
that many fp32 = calls times the mean square; then, in newer files, two more fields about the text. The newer one is GGUF with
``general.type`` "imatrix": tensors ``<name>.in_sum2`` (sums of squares) and ``<name>.counts``, both F32.

Source: llama.cpp ``tools/imatrix/imatrix.cpp`` (save_imatrix_legacy, save_imatrix).
"""

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...models.common.errors import UserError
from .gguf_file import GgufFile, read_gguf

MAX_BYTES = 1 << 31
_SUMS, _COUNTS = ".in_sum2", ".counts"
_REMEDY = "give a file that llama-imatrix wrote"


def read_imatrix(path: Path) -> dict[str, NDArray[np.float32]]:
    """Read the mean squares, fp32 [inputs], by the tensors' names in GGUF, such as ``blk.0.ffn_down.weight``.

    Raises:
        UserError: the file cannot be read, is of neither form, damaged, or has numbers that are negative, not finite, or zero for a whole
            entry (no text reached it).
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            first = handle.read(4)
        if size > MAX_BYTES:
            raise UserError(f"{path} has {size:,} bytes, too many for an importance matrix; {_REMEDY}")
        found = _of_gguf(read_gguf(path)) if first == b"GGUF" else _of_legacy(path, path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    for name, values in found.items():
        if not np.isfinite(values).all() or (values < 0).any() or not values.any():
            raise UserError(f"{path}: the numbers of {name!r:.200} are no mean squares, or no text reached it; {_REMEDY}")
    return found


def _of_legacy(path: Path, raw: bytes) -> dict[str, NDArray[np.float32]]:
    at, found = 0, dict[str, NDArray[np.float32]]()

    def take(length: int) -> bytes:
        nonlocal at
        if length < 0 or at + length > len(raw):
            raise UserError(f"{path} is not an importance matrix, or is cut off at byte {at:,} of {len(raw):,}; {_REMEDY}")
        at += length
        return raw[at - length : at]

    def number() -> int:
        return struct.unpack("<i", take(4))[0]

    entries = number()
    # an entry has a name, two numbers and a value at least; said before anything else, because any file begins with four bytes
    if not 0 < entries <= len(raw) // 17:
        raise UserError(f"{path} is not an importance matrix; {_REMEDY}")
    for _ in range(entries):
        name = take(number()).decode("utf-8", "replace")
        calls, count = number(), number()
        values = np.frombuffer(take(4 * max(-1, count)), "<f4")
        if name in found or not name.isprintable() or calls < 1 or not count:
            raise UserError(f"{path} is not an importance matrix: entry {name!r:.100} is damaged or occurs twice; {_REMEDY}")
        found[name] = (values / np.float32(calls)).astype(np.float32)
    return found


def _of_gguf(file: GgufFile) -> dict[str, NDArray[np.float32]]:
    if file.metadata.get("general.type") != "imatrix":
        raise UserError(f"{file.path} is a GGUF file, but no importance matrix (general.type is no 'imatrix'); {_REMEDY}")
    found: dict[str, NDArray[np.float32]] = {}
    for name in (name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)):
        if name + _COUNTS not in file.tensors:
            raise UserError(f"{file.path}: {name!r:.200} has sums without counts; {_REMEDY}")
        sums, counts = file.read(name + _SUMS), file.read(name + _COUNTS)
        # several rows are those of experts
        if sums.size != sums.shape[-1] or counts.size != 1:
            raise UserError(f"{file.path}: {name!r:.200} has several matrices (experts), which decoct does not read")
        if not counts.flat[0] > 0:
            raise UserError(f"{file.path}: no text reached {name!r:.200}; {_REMEDY}")
        found[name] = sums.reshape(-1) / np.float32(counts.flat[0])
    if not found:
        raise UserError(f"{file.path} is an importance matrix without entries; {_REMEDY}")
    return found
