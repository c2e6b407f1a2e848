"""Decodes ggml's super-blocks of 256 weights (Q2_K to Q6_K), element by element from the format's definition.

It shares no code with the writer (``export/gguf/super_blocks.py``): for every element it looks up the byte and the bits that hold it.

Source: ggml ``ggml-common.h`` (block_q2_K to block_q6_K), ``ggml-quants.c`` (dequantize_row_*).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Blocks = NDArray[np.uint8]
SUPER_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_AT = np.arange(256)
"""Number of each element in its block."""


class SuperBlocks(NamedTuple):
    """Some decoded blocks."""

    values: NDArray[np.float32]
    """[blocks, 256]."""
    codes: NDArray[np.int8]
    """[blocks, 256]; Q3_K and Q6_K with a sign."""
    numbers: NDArray[np.float32]
    """[blocks, all numbers of a block but its codes]: d, dmin if there is one, sub-scales, sub-minimums if there are any."""


def decode_super_blocks(form: str, blocks: Blocks) -> SuperBlocks:
    """Decode blocks uint8 [blocks, bytes of a block] of a type."""
    layout = {"Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}[form]
    codes, halves, scales, minimums = layout(blocks)
    sub = _AT // (256 // scales.shape[1])
    # a damaged fp16 may be infinite; the caller checks the values
    with np.errstate(invalid="ignore", over="ignore"):
        # ggml multiplies the two scales first, then with the code; each product is exact in fp32
        values = (halves[0] * scales)[:, sub] * codes.astype(np.float32)
        if minimums is not None:
            values -= (halves[1] * minimums)[:, sub]
    if minimums is None:
        return SuperBlocks(values, codes, np.concatenate([halves[0], scales], axis=1))
    return SuperBlocks(values, codes, np.concatenate([*halves, scales, minimums], axis=1))


_Layout = tuple[NDArray[np.int8], list[NDArray[np.float32]], NDArray[np.float32], NDArray[np.float32] | None]


def _q2_k(blocks: Blocks) -> _Layout:
    codes = _field(blocks, 16 + 32 * (_AT // 128) + _AT % 32, 2 * (_AT % 128 // 32), 2)
    scales, minimums = (_field(blocks, np.arange(16), shift, 4).astype(np.float32) for shift in (0, 4))
    return codes, [_fp16(blocks, 80), _fp16(blocks, 82)], scales, minimums


def _q3_k(blocks: Blocks) -> _Layout:
    pairs = _field(blocks, 32 + 32 * (_AT // 128) + _AT % 32, 2 * (_AT % 128 // 32), 2)
    thirds = _field(blocks, _AT % 32, _AT // 32, 1)
    number = np.arange(16)
    low = _field(blocks, 96 + number % 8, 4 * (number // 8), 4)
    high = _field(blocks, 104 + number % 4, 2 * (number // 4), 2)
    # a third bit of 0 means minus 4
    return pairs + 4 * thirds - np.int8(4), [_fp16(blocks, 108)], (low + 16 * high).astype(np.float32) - 32, None


def _q4_k(blocks: Blocks) -> _Layout:
    codes = _field(blocks, 16 + 32 * (_AT // 64) + _AT % 32, 4 * (_AT % 64 // 32), 4)
    return codes, [_fp16(blocks, 0), _fp16(blocks, 2)], *_six_bits(blocks)


def _q5_k(blocks: Blocks) -> _Layout:
    codes = _field(blocks, 48 + 32 * (_AT // 64) + _AT % 32, 4 * (_AT % 64 // 32), 4) + 16 * _field(blocks, 16 + _AT % 32, _AT // 32, 1)
    return codes, [_fp16(blocks, 0), _fp16(blocks, 2)], *_six_bits(blocks)


def _q6_k(blocks: Blocks) -> _Layout:
    low = _field(blocks, 64 * (_AT // 128) + _AT % 64, 4 * (_AT % 128 // 64), 4)
    high = _field(blocks, 128 + 32 * (_AT // 128) + _AT % 32, 2 * (_AT % 128 // 32), 2)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return low + 16 * high - np.int8(32), [_fp16(blocks, 208)], scales, None


def _six_bits(blocks: Blocks) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The 8 scales and 8 minimums in bytes 4 to 15."""
    first = np.arange(4)
    scales, minimums = (_field(blocks, start + first, 0, 6) for start in (4, 8))
    # the last four: low bits in the third group of bytes, high bits above the first four numbers
    more = [_field(blocks, 12 + first, shift, 4) + 16 * _field(blocks, start + first, 6, 2) for shift, start in ((0, 4), (4, 8))]
    return tuple(np.concatenate(pair, axis=1).astype(np.float32) for pair in zip((scales, minimums), more))  # pyright: ignore[reportReturnType]


def _field(blocks: Blocks, byte: NDArray[np.int64], shift: NDArray[np.int64] | int, bits: int) -> NDArray[np.int8]:
    """``bits`` bits from bit ``shift`` on of the given bytes of each block: [blocks, numbers]."""
    return (blocks[:, byte] >> np.asarray(shift, np.uint8) & np.uint8((1 << bits) - 1)).astype(np.int8)


def _fp16(blocks: Blocks, start: int) -> NDArray[np.float32]:
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)
