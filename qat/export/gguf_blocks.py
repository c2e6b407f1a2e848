"""Codes and scales as ggml blocks of 32 weights: Q4_0, Q4_1, Q8_0. Nothing is rounded; a scale that fp16 does not hold is an error.

    Q4_0   18 bytes   fp16 d, 16 bytes: byte j = u[j] | u[j + 16] << 4      w = d * (u - 8)     u = q + 8
    Q4_1   20 bytes   fp16 d, fp16 m, the same 16 bytes                     w = d * u + m
    Q8_0   34 bytes   fp16 d, 32 int8                                       w = d * q

A group of g weights (a multiple of 32) is written as g / 32 blocks with the same scale. The asymmetric lattice (q - z) * s is Q4_1
with d = s and m = -(z + 8) * s, where that product fits fp16: u - 8 - z = q - z.

Source: ggml ``ggml-common.h``, ``ggml-quants.c`` (dequantize_row_*).
"""

import numpy as np
from numpy.typing import NDArray

BLOCK = 32

Bytes = NDArray[np.uint8]


def pack_q4_0(codes: NDArray[np.int8], scales: NDArray[np.float32]) -> Bytes:
    """Symmetric codes of at most 4 bits.

    Args:
        codes: int8 [out, in], values in [-8, 7], in a multiple of 32.
        scales: fp32 [out, groups], each exact in fp16; in / groups is a multiple of 32.

    Returns:
        uint8 [out, in / 32, 18].

    Raises:
        ValueError: a code out of range, a scale that fp16 does not hold, or widths that are no multiples of 32.
    """
    return np.concatenate([_halves(codes, scales), _nibbles(codes)], axis=2)


def pack_q4_1(codes: NDArray[np.int8], scales: NDArray[np.float32], zero_points: NDArray[np.int8]) -> Bytes:
    """Asymmetric codes of at most 4 bits, w = (q - z) * s.

    Args:
        codes: int8 [out, in], values in [-8, 7].
        scales: fp32 [out, groups].
        zero_points: int8 [out, groups], values in [-8, 7].

    Returns:
        uint8 [out, in / 32, 20].

    Raises:
        ValueError: as ``pack_q4_0``, or (z + 8) * s is not exact in fp16.
    """
    return np.concatenate([_halves(codes, scales), _halves(codes, minimums(scales, zero_points)), _nibbles(codes)], axis=2)


def pack_q8_0(codes: NDArray[np.int8], scales: NDArray[np.float32]) -> Bytes:
    """Symmetric codes of at most 8 bits; arguments and errors as ``pack_q4_0``, codes in [-128, 127]. Returns uint8 [out, in / 32, 34]."""
    blocks = np.ascontiguousarray(codes).reshape(codes.shape[0], -1, BLOCK)
    return np.concatenate([_halves(codes, scales), blocks.view(np.uint8)], axis=2)


def minimums(scales: NDArray[np.float32], zero_points: NDArray[np.int8]) -> NDArray[np.float32]:
    """m of Q4_1: fp32 [out, groups] = -(z + 8) * s, exact (12 bits at most for scales of 8)."""
    return -(zero_points.astype(np.float32) + np.float32(8)) * scales


def fits_fp16(values: NDArray[np.float32]) -> bool:
    """Whether fp16 holds every number exactly."""
    with np.errstate(over="ignore"):
        return bool(np.array_equal(values.astype(np.float16).astype(np.float32), values))


def _halves(codes: NDArray[np.int8], numbers: NDArray[np.float32]) -> Bytes:
    """A number per group as the fp16 of each of its blocks: uint8 [out, in / 32, 2]."""
    (rows, columns), groups = codes.shape, numbers.shape[1]
    if columns % BLOCK or not groups or columns % groups or columns // groups % BLOCK:
        raise ValueError(f"{groups} groups of {columns} inputs are no multiples of a block of {BLOCK}")
    if not fits_fp16(numbers):
        raise ValueError("a scale or minimum is not exact in fp16")
    repeated = np.repeat(numbers.astype("<f2"), columns // groups // BLOCK, axis=1)
    return np.ascontiguousarray(repeated).view(np.uint8).reshape(rows, columns // BLOCK, 2)


def _nibbles(codes: NDArray[np.int8]) -> Bytes:
    """uint8 [out, in / 32, 16]."""
    if codes.size and not -8 <= int(codes.min()) <= int(codes.max()) <= 7:
        raise ValueError(f"codes span {int(codes.min())}..{int(codes.max())}; 4 bits hold -8..7")
    unsigned = (codes.astype(np.int16) + 8).astype(np.uint8).reshape(codes.shape[0], -1, BLOCK)
    return unsigned[:, :, : BLOCK // 2] | unsigned[:, :, BLOCK // 2 :] << np.uint8(4)
