"""Packs ternary codes into ggml's blocks of 256 weights, w = d * (u - 1) with u = q + 1 in 0, 1, 2. Nothing is rounded.

    TQ1_0   54 bytes   48 bytes of 5 digits, 4 bytes of 4 digits, fp16 d      1.6875 bits per weight
    TQ2_0   66 bytes   64 bytes of 4 pairs of bits, fp16 d                    2.0625 bits per weight

TQ1_0: byte m of the first 32 holds elements m, 32 + m, .., 128 + m, byte m of the next 16 elements 160 + m, 176 + m, .., 224 + m, and byte
m of the last 4 elements 240 + m, 244 + m, 248 + m, 252 + m. A byte is n / 243 as a fraction of 256, rounded up, where n has the digits in
base 3, the first element's foremost; where there are four, the fifth is 0. TQ2_0: byte m of the 32 of a half holds elements m, 32 + m, 64 +
m and 96 + m of its 128, the first in its lowest bits.

Source: ggml ``ggml-common.h`` (block_tq1_0, block_tq2_0), ``ggml-quants.c`` (quantize_row_tq1_0_ref, dequantize_row_tq1_0).
"""

import numpy as np
from numpy.typing import NDArray

from ...super_blocks import WIDTH
from .blocks import Bytes, block_scales, check_range

_DIGITS = 5
# elements of a block: (the first, bytes, digits of a byte)
_PARTS = ((0, 32, 5), (160, 16, 5), (240, 4, 4))


def pack_tq1_0(codes: NDArray[np.int8], scales: NDArray[np.float32]) -> Bytes:
    """Pack ternary codes: uint8 [out, in / 256, 54]; arguments and errors as ``blocks.pack_q4_0``, codes in [-1, 1], blocks of 256."""
    fields = _fields(codes)
    packed = []
    for begin, width, digits in _PARTS:
        # [out, blocks, digits, bytes]
        part = fields[..., begin : begin + width * digits].reshape(*fields.shape[:2], digits, width).astype(np.uint16)
        weights = np.array([3 ** (_DIGITS - 1 - digit) for digit in range(digits)], np.uint16)[:, None]
        number = (part * weights).sum(2)
        packed.append(((number * 256 + 242) // 243).astype(np.uint8))
    return np.concatenate([*packed, block_scales(codes, scales, WIDTH)], axis=2)


def pack_tq2_0(codes: NDArray[np.int8], scales: NDArray[np.float32]) -> Bytes:
    """Pack ternary codes: uint8 [out, in / 256, 66]; arguments and errors as ``pack_tq1_0``."""
    fields = _fields(codes)
    pairs = fields.reshape(*fields.shape[:2], 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    packed = np.bitwise_or.reduce(pairs, axis=3).reshape(*fields.shape[:2], -1)
    return np.concatenate([packed, block_scales(codes, scales, WIDTH)], axis=2)


def _fields(codes: NDArray[np.int8]) -> Bytes:
    """uint8 [out, in / 256, 256] of 0..2."""
    check_range(codes, -1, 1)
    rows, columns = codes.shape
    if columns % WIDTH:
        raise ValueError(f"{columns} inputs are no multiple of a block of {WIDTH}")
    return (codes + np.int8(1)).astype(np.uint8).reshape(rows, columns // WIDTH, WIDTH)
