"""Packs codes and scales into ggml blocks of 32 or 64 weights. Nothing is rounded; a scale that fp16 does not hold is an error.

    Q2_0   18 bytes   64 weights: fp16 d, 16 bytes: byte j = u[4j] | u[4j + 1] << 2 | ...   w = d * (u - 1)    u = 1 - q, d = -s
    Q4_0   18 bytes   fp16 d, 16 bytes: byte j = u[j] | u[j + 16] << 4                      w = d * (u - 8)    u = q + 8
    Q4_1   20 bytes   fp16 d, fp16 m, the same 16 bytes                                     w = d * u + m
    Q5_0   22 bytes   fp16 d, 4 bytes: bit j = fifth bit of u[j], the same 16 bytes         w = d * (u - 16)   u = q + 16
    Q5_1   24 bytes   fp16 d, fp16 m, the same 4 and 16 bytes                               w = d * u + m
    Q8_0   34 bytes   fp16 d, 32 int8                                                       w = d * q

A group (a multiple of the block) is written as several blocks with the same scale. Q2_0 holds -1 to 2, so codes of -2 to 1 are written with
the sign of both factors flipped. The asymmetric (q - z) * s is written as Q4_1 or Q5_1 with d = s if m is exact in fp16. Codes narrower
than the block are shifted by 8 - z (or 16 - z), so m = -8 s (or -16 s) is always exact. Codes as wide as the block are shifted by 8 (or
16), and m = -(z + 8) * s often has too many significant bits.

Source: ggml ``ggml-common.h``, ``ggml-quants.c`` (dequantize_row_*).
"""

import numpy as np
from numpy.typing import NDArray

from ...spec import QuantSpec
from ...super_blocks import WIDTH
from .container import TensorType

BLOCK, WIDE_BLOCK = 32, 64
"""Weights per block, and per Q2_0 block."""
SYMMETRIC_BITS = (4, 5, 8)
"""Bit widths of symmetric blocks (Q4_0, Q5_0, Q8_0; Q2_0 is separate). Narrower codes take the next wider block."""
ASYMMETRIC_BITS = (4, 5)
"""Bit widths of blocks with a minimum (Q4_1, Q5_1)."""
PREFERRED = {"gguf-q2_0": TensorType.Q2_0, "gguf-tq1_0": TensorType.TQ1_0}
"""Format -> the block type that it takes wherever that holds the codes."""

Bytes = NDArray[np.uint8]


def pack_q2_0(codes: NDArray[np.int8], scales: NDArray[np.float32]) -> Bytes:
    """Pack symmetric 2-bit codes: uint8 [out, in / 64, 18]; arguments and errors as ``pack_q4_0``, codes in [-2, 1], blocks of 64."""
    check_range(codes, -2, 1)
    # u = 1 - q with d = -s: the format holds -1..2, the codes are -2..1
    fields = (1 - codes.astype(np.int16)).astype(np.uint8).reshape(codes.shape[0], -1, WIDE_BLOCK // 4, 4)
    # [out, blocks, 16, 4]: four neighbouring weights share a byte, the first in its lowest bits
    packed = np.bitwise_or.reduce(fields << np.array([0, 2, 4, 6], np.uint8), axis=3)
    return np.concatenate([block_scales(codes, -scales, WIDE_BLOCK), packed], axis=2)


def pack_q4_0(codes: NDArray[np.int8], scales: NDArray[np.float32]) -> Bytes:
    """Pack symmetric codes of at most 4 bits.

    Args:
        codes: int8 [out, in], values in [-8, 7]; ``in`` is a multiple of 32.
        scales: fp32 [out, groups], each exact in fp16; in / groups is a multiple of 32.

    Returns:
        uint8 [out, in / 32, 18].

    Raises:
        ValueError: a code out of range, a scale that fp16 does not hold, or widths that are no multiples of 32.
    """
    return np.concatenate([block_scales(codes, scales), _nibbles(_moved(codes, 8, 4))], axis=2)


def pack_q5_0(codes: NDArray[np.int8], scales: NDArray[np.float32]) -> Bytes:
    """Pack symmetric codes of at most 5 bits: uint8 [out, in / 32, 22]; arguments and errors as ``pack_q4_0``, codes in [-16, 15]."""
    # u = q + 16 in 0..31: four bits go into the nibbles, the fifth into qh
    fields = _moved(codes, 16, 5)
    return np.concatenate([block_scales(codes, scales), _fifth_bits(fields), _nibbles(fields % 16)], axis=2)


def pack_q8_0(codes: NDArray[np.int8], scales: NDArray[np.float32]) -> Bytes:
    """Pack symmetric codes of at most 8 bits: uint8 [out, in / 32, 34]; arguments and errors as ``pack_q4_0``, codes in [-128, 127]."""
    # contiguous, because the view as bytes needs it
    blocks = np.ascontiguousarray(codes).reshape(codes.shape[0], -1, BLOCK)
    return np.concatenate([block_scales(codes, scales), blocks.view(np.uint8)], axis=2)


def pack_q4_1(codes: NDArray[np.int8], scales: NDArray[np.float32], zero_points: NDArray[np.int8], bits: int = 4) -> Bytes:
    """Pack asymmetric codes of at most 4 bits, w = (q - z) * s.

    Args:
        codes: int8 [out, in], values in [-2^(bits-1), 2^(bits-1) - 1].
        scales: fp32 [out, groups].
        zero_points: int8 [out, groups], in the range of the codes.
        bits: Width of a code.

    Returns:
        uint8 [out, in / 32, 20].

    Raises:
        ValueError: as ``pack_q4_0``, or a minimum is not exact in fp16.
    """
    fields = _moved(codes, _offsets(zero_points, bits, 4), 4)
    return np.concatenate([block_scales(codes, scales), block_scales(codes, minimums(scales, zero_points, bits)), _nibbles(fields)], axis=2)


def pack_q5_1(codes: NDArray[np.int8], scales: NDArray[np.float32], zero_points: NDArray[np.int8], bits: int = 5) -> Bytes:
    """Pack asymmetric codes of at most 5 bits: uint8 [out, in / 32, 24]; arguments and errors as ``pack_q4_1``."""
    fields = _moved(codes, _offsets(zero_points, bits, 5), 5)
    least = minimums(scales, zero_points, bits, 5)
    return np.concatenate([block_scales(codes, scales), block_scales(codes, least), _fifth_bits(fields), _nibbles(fields % 16)], axis=2)


def symmetric_bits(bits: int) -> int:
    """Return the width of the narrowest block for symmetric codes of ``bits``."""
    return next(width for width in SYMMETRIC_BITS if bits <= width)


def symmetric_type(spec: QuantSpec, columns: int, preferred: TensorType | None = None) -> TensorType:
    """Return the block type of symmetric codes of a matrix with ``columns`` inputs: ``preferred`` (Q2_0 or TQ1_0) if that holds it, TQ2_0
    for ternary codes, or else the narrowest of Q4_0, Q5_0 and Q8_0."""
    if preferred == TensorType.Q2_0 and is_q2_0(spec, columns):
        return preferred
    if is_ternary(spec, columns):
        return TensorType.TQ1_0 if preferred == TensorType.TQ1_0 else TensorType.TQ2_0
    return {4: TensorType.Q4_0, 5: TensorType.Q5_0, 8: TensorType.Q8_0}[symmetric_bits(spec.bits)]


def is_q2_0(spec: QuantSpec, columns: int) -> bool:
    """Return whether Q2_0 holds a matrix with ``columns`` inputs: symmetric 2-bit codes, rows and groups of whole blocks."""
    return (spec.kind, spec.bits, spec.symmetric) == ("int", 2, True) and _whole_blocks(spec, columns, WIDE_BLOCK)


def is_ternary(spec: QuantSpec, columns: int) -> bool:
    """Return whether TQ1_0 and TQ2_0 hold a matrix with ``columns`` inputs: ternary codes, rows and groups of whole blocks."""
    return spec.ternary and _whole_blocks(spec, columns, WIDTH)


def _whole_blocks(spec: QuantSpec, columns: int, block: int) -> bool:
    # "channel" and "tensor" give a row one scale, repeated for its blocks
    group = columns if isinstance(spec.group_size, str) else spec.group_size
    return columns % block == 0 and group % block == 0


def minimums(scales: NDArray[np.float32], zero_points: NDArray[np.int8], bits: int = 4, width: int = 4) -> NDArray[np.float32]:
    """Return m of Q4_1 (``width`` 4) or Q5_1 (5) for codes of ``bits``: fp32 [out, groups], exact."""
    # w = (q - z) s = s u + m with u = q + offset, so m = -(z + offset) s
    return -(zero_points.astype(np.float32) + _offsets(zero_points, bits, width).astype(np.float32)) * scales


def fits_fp16(values: NDArray[np.float32]) -> bool:
    """Return whether fp16 holds every number exactly."""
    # what is too large becomes infinite, which equals no number
    with np.errstate(over="ignore"):
        return bool(np.array_equal(values.astype(np.float16).astype(np.float32), values))


def _offsets(zero_points: NDArray[np.int8], bits: int, width: int) -> NDArray[np.int16]:
    """Return the shift of each group's codes, int16 [out, groups]. code - zero point needs one bit more than the code, so only blocks wider
    than the codes have room for it."""
    half = np.int16(1 << (width - 1))
    return half - zero_points.astype(np.int16) if bits < width else np.full(zero_points.shape, half)


def block_scales(codes: NDArray[np.int8], numbers: NDArray[np.float32], block: int = BLOCK) -> Bytes:
    """Return one number per group, repeated for its blocks, as fp16 bytes: uint8 [out, in / block, 2]."""
    (rows, columns), groups = codes.shape, numbers.shape[1]
    if columns % block or not groups or columns % groups or columns // groups % block:
        raise ValueError(f"{groups} groups of {columns} inputs are no multiples of a block of {block}")
    if not fits_fp16(numbers):
        raise ValueError("a scale or minimum is not exact in fp16")
    # [out, groups] -> [out, blocks]
    repeated = np.repeat(numbers.astype("<f2"), columns // groups // block, axis=1)
    return np.ascontiguousarray(repeated).view(np.uint8).reshape(rows, columns // block, 2)


def _moved(codes: NDArray[np.int8], offset: int | NDArray[np.int16], width: int) -> Bytes:
    """Return codes shifted to 0..2^width - 1, in blocks: uint8 [out, in / 32, 32]. ``offset`` is one number, or one per group."""
    rows, columns = codes.shape
    by_group = offset if isinstance(offset, int) else np.repeat(offset, columns // offset.shape[1], axis=1)
    # int16, because the sum may not fit int8; the range is checked before the cast back
    moved = codes.astype(np.int16) + by_group
    check_range(moved, 0, (1 << width) - 1)
    return moved.astype(np.uint8).reshape(rows, -1, BLOCK)


def check_range(values: NDArray[np.int8] | NDArray[np.int16], least: int, most: int) -> None:
    # an empty matrix has no extremes
    if values.size and not least <= int(values.min()) <= int(values.max()) <= most:
        raise ValueError(f"codes span {int(values.min())}..{int(values.max())}; the block holds {least}..{most}")


def _nibbles(fields: Bytes) -> Bytes:
    """Pack [out, blocks, 32] of 0..15 into uint8 [out, blocks, 16]: a byte holds elements j (low half) and j + 16."""
    return fields[:, :, : BLOCK // 2] | fields[:, :, BLOCK // 2 :] << np.uint8(4)


def _fifth_bits(fields: Bytes) -> Bytes:
    """Pack the fifth bits of [out, blocks, 32] of 0..31 into uint8 [out, blocks, 4], lowest bit first."""
    # bit j of the four bytes, read as one little-endian number, belongs to weight j
    return np.packbits(fields >> np.uint8(4), axis=2, bitorder="little")
