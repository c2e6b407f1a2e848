"""Unpacks ggml blocks into fp32, in numpy: the numbers that llama.cpp multiplies with.

Every function takes blocks as uint8 [n, bytes of a block] and returns fp32 [n, elements of a block]. Products and sums are fp32 in the
order of ggml, so that the results are the same bits. Code books (IQ1 to IQ3) come from the package ``gguf``.

Source: ggml ``ggml-common.h`` (layouts), ``ggml-quants.c`` (dequantize_row_*).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import UserError
from .block_types import CODEBOOKS, number_of

Blocks = NDArray[np.uint8]
Values = NDArray[np.float32]

_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
"""The 16 values of IQ4_NL and IQ4_XS."""
_FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
"""Twice the 16 values of a 4-bit float (E2M1)."""


def unpack(type_name: str, blocks: Blocks) -> Values:
    """Unpack blocks of a type.

    Args:
        type_name: Name of the type, such as Q4_K.
        blocks: uint8 [n, bytes of a block].

    Raises:
        UserError: the type cannot be unpacked, or needs the package ``gguf``, which is not installed.
    """
    if type_name in _UNPACK:
        # a damaged scale may be infinite or NaN; whoever stores the values checks them
        with np.errstate(invalid="ignore", over="ignore"):
            return _UNPACK[type_name](blocks)
    if type_name not in CODEBOOKS:
        raise UserError(f"GGUF tensors of type {type_name} hold no weights that can be unpacked; known are {', '.join(known_types())}")
    return _by_package(type_name, blocks)


def known_types() -> list[str]:
    """Names of all types that can be unpacked."""
    return [*_UNPACK, *CODEBOOKS]


def check_installed(type_name: str) -> None:
    """Raise UserError if a type needs the package ``gguf`` and it is not installed."""
    if type_name in CODEBOOKS:
        _package(type_name)


def _package(type_name: str) -> Any:
    try:
        from gguf import quants
    except ImportError as error:
        raise UserError(f"GGUF blocks of type {type_name} are unpacked with the package gguf; install it: pip install gguf") from error
    return quants


def _by_package(type_name: str, blocks: Blocks) -> Values:
    from gguf import GGMLQuantizationType

    quants = _package(type_name)
    with np.errstate(invalid="ignore", over="ignore"):
        # contiguous: the package looks at the bytes as other types
        return quants.dequantize(np.ascontiguousarray(blocks), GGMLQuantizationType(number_of(type_name)))


def _half(blocks: Blocks, at: int) -> Values:
    """The fp16 at byte ``at`` of every block: fp32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Blocks, width: int) -> Blocks:
    """[n, bytes] -> [n, 2 x bytes]: of every ``width`` bytes first the low halves, then the high halves."""
    # each byte is taken twice, shifted by 0 and by 4 (>> binds before &)
    parts = packed.reshape(len(packed), -1, 1, width) >> np.array([0, 4], np.uint8)[:, None] & np.uint8(15)
    return parts.reshape(len(packed), -1)


def _bit_pairs(packed: Blocks) -> Blocks:
    """[n, bytes] -> [n, 4 x bytes]: of every 32 bytes the lowest pairs of bits first, the highest last."""
    parts = packed.reshape(len(packed), -1, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & np.uint8(3)
    return parts.reshape(len(packed), -1)


def _fifth_bits(packed: Blocks) -> Blocks:
    """[n, 4] -> [n, 32] of 0 and 16: bit j of a little-endian number is the fifth bit of element j."""
    return np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Blocks) -> Values:
    # codes are stored from 0; 8 stands for zero
    return (_nibbles(blocks[:, 2:], 16).astype(np.float32) - 8) * _half(blocks, 0)


def _q4_1(blocks: Blocks) -> Values:
    return _nibbles(blocks[:, 4:], 16).astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: Blocks) -> Values:
    return ((_nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])).astype(np.float32) - 16) * _half(blocks, 0)


def _q5_1(blocks: Blocks) -> Values:
    # the minimum is added, as ggml does, not subtracted
    fields = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return fields.astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: Blocks) -> Values:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32) * _half(blocks, 0)


def _q2_0(blocks: Blocks) -> Values:
    # four neighbours to a byte, the first lowest
    fields = blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & np.uint8(3)
    return (fields.reshape(len(blocks), -1).astype(np.float32) - 1) * _half(blocks, 0)


def _by_group(fields: NDArray[np.generic], scales: Values, minimums: Values | None = None) -> Values:
    """Fields [n, elements] times a scale per group [n, groups], minus a minimum per group."""
    grouped = fields.reshape(*scales.shape, -1).astype(np.float32) * scales[:, :, None]
    if minimums is not None:
        grouped -= minimums[:, :, None]
    return grouped.reshape(len(fields), -1)


def _q2_k(blocks: Blocks) -> Values:
    scales, fields = blocks[:, :16], _bit_pairs(blocks[:, 16:80])
    # K-quants: a 4-bit scale and a 4-bit minimum per group, each times one fp16 of the block
    return _by_group(fields, _half(blocks, 80) * (scales & np.uint8(15)), _half(blocks, 82) * (scales >> np.uint8(4)))


def _q3_k(blocks: Blocks) -> Values:
    high, low, packed = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108]
    # 16 scales of 6 bits: four low bits in the first 8 bytes, two high bits in the last 4
    nibbles = _nibbles(packed[:, :8], 8)
    pairs = (packed[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & np.uint8(3)).reshape(len(blocks), 16)
    scales = (nibbles | pairs << np.uint8(4)).astype(np.float32) - 32
    # bit k of byte l belongs to element 32 k + l
    bits = (high[:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)).reshape(len(blocks), -1)
    fields = (_bit_pairs(low) | bits << np.uint8(2)).astype(np.float32) - 4
    return _by_group(fields, _half(blocks, 108) * scales)


def _six_bits(packed: Blocks) -> tuple[Blocks, Blocks]:
    """8 scales and 8 minimums of 6 bits each in 12 bytes: ([n, 8], [n, 8])."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    # the last four scales take their upper bits from the first four bytes
    scales = np.concatenate([first & np.uint8(63), third & np.uint8(15) | (first >> np.uint8(6)) << np.uint8(4)], axis=1)
    minimums = np.concatenate([second & np.uint8(63), third >> np.uint8(4) | (second >> np.uint8(6)) << np.uint8(4)], axis=1)
    return scales, minimums


def _q4_k(blocks: Blocks) -> Values:
    scales, minimums = _six_bits(blocks[:, 4:16])
    return _by_group(_nibbles(blocks[:, 16:], 32), _half(blocks, 0) * scales, _half(blocks, 2) * minimums)


def _q5_k(blocks: Blocks) -> Values:
    scales, minimums = _six_bits(blocks[:, 4:16])
    # bit k of byte l belongs to element 32 k + l
    bits = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)).reshape(len(blocks), -1)
    fields = _nibbles(blocks[:, 48:], 32) | bits << np.uint8(4)
    return _by_group(fields, _half(blocks, 0) * scales, _half(blocks, 2) * minimums)


def _q6_k(blocks: Blocks) -> Values:
    fields = (_nibbles(blocks[:, :128], 64) | _bit_pairs(blocks[:, 128:192]) << np.uint8(4)).astype(np.float32) - 32
    # scales of Q6_K are signed bytes
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return _by_group(fields, _half(blocks, 208) * scales)


def _iq4_nl(blocks: Blocks) -> Values:
    return _IQ4[_nibbles(blocks[:, 2:], 16)] * _half(blocks, 0)


def _iq4_xs(blocks: Blocks) -> Values:
    # two high bits of eight scales in one 16-bit number
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & np.uint16(3)
    low = (blocks[:, 4:8, None] >> np.array([0, 4], np.uint8) & np.uint8(15)).reshape(len(blocks), 8)
    scales = (low | high.astype(np.uint8) << np.uint8(4)).astype(np.float32) - 32
    return _by_group(_IQ4[_nibbles(blocks[:, 8:], 16)], _half(blocks, 0) * scales)


def _digits(packed: Blocks, count: int) -> Blocks:
    """The first ``count`` base-3 digits of bytes [n, width] as [n, count x width]; a byte is a fraction of 256 in base 3."""
    # uint8 arithmetic wraps, which drops the digits that were taken
    shifted = packed[:, None, :] * np.array([1, 3, 9, 27, 81], np.uint8)[:count, None]
    return (shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(packed), -1)


def _tq1_0(blocks: Blocks) -> Values:
    # (32 + 16) x 5 + 4 x 4 = 256 digits
    fields = np.concatenate([_digits(blocks[:, :32], 5), _digits(blocks[:, 32:48], 5), _digits(blocks[:, 48:52], 4)], axis=1)
    return (fields.astype(np.float32) - 1) * _half(blocks, 52)


def _tq2_0(blocks: Blocks) -> Values:
    return (_bit_pairs(blocks[:, :64]).astype(np.float32) - 1) * _half(blocks, 64)


def _mxfp4(blocks: Blocks) -> Values:
    exponents = blocks[:, :1].astype(np.uint32)
    # half of 2^(e - 127), because the table holds twice the values; the two smallest are subnormal
    bits = np.where(exponents < 2, np.uint32(0x00200000) << exponents, (exponents - np.uint32(1)) << np.uint32(23))
    return _FP4[_nibbles(blocks[:, 1:], 16)] * bits.astype(np.uint32).view(np.float32)


def _f32(blocks: Blocks) -> Values:
    return np.ascontiguousarray(blocks).view("<f4").astype(np.float32)


def _f16(blocks: Blocks) -> Values:
    return np.ascontiguousarray(blocks).view("<f2").astype(np.float32)


def _bf16(blocks: Blocks) -> Values:
    # the upper half of the same number in fp32
    return (np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


_UNPACK: dict[str, Callable[[Blocks], Values]] = {
    "F32": _f32, "F16": _f16, "BF16": _bf16, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_0": _q2_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0, "TQ2_0": _tq2_0, "MXFP4": _mxfp4,
}  # fmt: skip
