"""Packs codes and sub-scales into ggml's super-blocks of 256 weights, the K-quants. Nothing is rounded.

    Q2_K   84 bytes   16 bytes sc | m << 4, 64 bytes of pairs, fp16 d, fp16 dmin
    Q3_K  110 bytes   32 bytes of third bits, 64 bytes of pairs, 12 bytes with 16 x (sc + 32), fp16 d              u = q + 4
    Q4_K  144 bytes   fp16 d, fp16 dmin, 12 bytes with 8 x (sc, m), 128 bytes of nibbles
    Q5_K  176 bytes   as Q4_K, with 32 bytes of fifth bits before the nibbles
    Q6_K  210 bytes   128 bytes of nibbles, 64 bytes of pairs (fifth and sixth bits), 16 int8 sc, fp16 d           u = q + 32

Pairs: byte l of the 32 of a half holds elements l, 32 + l, 64 + l and 96 + l of its 128, the first in its lowest bits. Nibbles: a byte
holds element l and, in its high half, l + 32 of every 64 (Q6_K: l + 64 of every 128). Single bits: bit k of byte l is that of element
32 k + l.

Source: ggml ``ggml-common.h`` (block_q2_K to block_q6_K), ``ggml-quants.c`` (dequantize_row_*).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...super_blocks import SUPER_BLOCKS, WIDTH
from .blocks import Bytes, fits_fp16
from .container import TensorType

SUPER_TYPES = {
    "q2_k": TensorType.Q2_K,
    "q3_k": TensorType.Q3_K,
    "q4_k": TensorType.Q4_K,
    "q5_k": TensorType.Q5_K,
    "q6_k": TensorType.Q6_K,
}
"""Kind -> its type of tensor."""


@dataclass(frozen=True, kw_only=True)
class SuperParts:
    """What the blocks of a matrix hold, rows by rows."""

    codes: NDArray[np.int8]
    """[out, in]."""
    scales: NDArray[np.float32]
    """[out, in / 256], exact in fp16."""
    sub_scales: NDArray[np.int8]
    """[out, in / sub-block]."""
    minimum: NDArray[np.float32] | None = None
    """[out, in / 256], exact in fp16; None for kinds without minimums."""
    sub_minimums: NDArray[np.int8] | None = None
    """[out, in / sub-block]; None for kinds without minimums."""


def pack_super(kind: str, parts: SuperParts) -> Bytes:
    """Pack a matrix: uint8 [out, in / 256, bytes of a block].

    Raises:
        ValueError: a code or sub-scale out of range, a scale that fp16 does not hold, or ``in`` is no multiple of 256.
    """
    form = SUPER_BLOCKS[kind]
    rows, columns = parts.codes.shape
    if columns % WIDTH:
        raise ValueError(f"{columns} inputs are no multiple of a block of {WIDTH}")
    low, high = form.codes
    shape = (rows, columns // WIDTH)
    # codes without a sign
    fields = _unsigned(parts.codes, low, 0, high - low).reshape(*shape, WIDTH)
    subs = parts.sub_scales.reshape(*shape, -1)
    scale = _half(parts.scales, shape)
    if parts.minimum is None or parts.sub_minimums is None:
        return np.concatenate(_SIGNED[kind](fields, subs, scale), axis=2)
    mins = _unsigned(parts.sub_minimums, 0, 0, form.most).reshape(*shape, -1)
    return np.concatenate(_WITH_MINIMUMS[kind](fields, _unsigned(subs, 0, 0, form.most), mins, scale, _half(parts.minimum, shape)), axis=2)


def _q2_k(fields: Bytes, subs: Bytes, mins: Bytes, scale: Bytes, minimum: Bytes) -> list[Bytes]:
    return [subs | mins << np.uint8(4), _pairs(fields), scale, minimum]


def _q4_k(fields: Bytes, subs: Bytes, mins: Bytes, scale: Bytes, minimum: Bytes) -> list[Bytes]:
    return [scale, minimum, _six_bits(subs, mins), _nibbles(fields, 32)]


def _q5_k(fields: Bytes, subs: Bytes, mins: Bytes, scale: Bytes, minimum: Bytes) -> list[Bytes]:
    return [scale, minimum, _six_bits(subs, mins), _single_bits(fields >> np.uint8(4)), _nibbles(fields & np.uint8(15), 32)]


def _q3_k(fields: Bytes, subs: NDArray[np.int8], scale: Bytes) -> list[Bytes]:
    moved = _unsigned(subs, -32, 0, 63)
    # four low bits of 16 numbers in 8 bytes; their two high bits in 4 bytes, number 4 i + j in pair i of byte j
    low = (moved[..., :8] & np.uint8(15)) | (moved[..., 8:] & np.uint8(15)) << np.uint8(4)
    high = (moved >> np.uint8(4)).reshape(*moved.shape[:2], 4, 4) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return [_single_bits(fields >> np.uint8(2)), _pairs(fields & np.uint8(3)), low, np.bitwise_or.reduce(high, axis=2), scale]


def _q6_k(fields: Bytes, subs: NDArray[np.int8], scale: Bytes) -> list[Bytes]:
    return [_nibbles(fields & np.uint8(15), 64), _pairs(fields >> np.uint8(4)), np.ascontiguousarray(subs).view(np.uint8), scale]


_WITH_MINIMUMS: dict[str, Callable[[Bytes, Bytes, Bytes, Bytes, Bytes], list[Bytes]]] = {"q2_k": _q2_k, "q4_k": _q4_k, "q5_k": _q5_k}
_SIGNED: dict[str, Callable[[Bytes, NDArray[np.int8], Bytes], list[Bytes]]] = {"q3_k": _q3_k, "q6_k": _q6_k}


def _unsigned(values: NDArray[np.int8], zero: int, least: int, most: int) -> Bytes:
    """Numbers less ``zero``, checked: one out of range would overwrite its neighbours."""
    moved = values.astype(np.int16) - zero
    if moved.size and not least <= int(moved.min()) <= int(moved.max()) <= most:
        raise ValueError(f"numbers span {int(values.min())}..{int(values.max())}; the block holds {least + zero}..{most + zero}")
    return moved.astype(np.uint8)


def _half(numbers: NDArray[np.float32], shape: tuple[int, int]) -> Bytes:
    """Return one fp16 per block as bytes: uint8 [out, blocks, 2]."""
    if numbers.shape != shape or not fits_fp16(numbers):
        raise ValueError("a scale of a block is missing, or not exact in fp16")
    return np.ascontiguousarray(numbers.astype("<f2")).view(np.uint8).reshape(*shape, 2)


def _nibbles(fields: Bytes, width: int) -> Bytes:
    """[.., 256] of 0..15 -> [.., 128]: of every 2 x ``width`` elements the first half goes into low halves of bytes."""
    parts = fields.reshape(*fields.shape[:2], -1, 2, width)
    return (parts[..., 0, :] | parts[..., 1, :] << np.uint8(4)).reshape(*fields.shape[:2], -1)


def _pairs(fields: Bytes) -> Bytes:
    """[.., 256] of 0..3 -> [.., 64]."""
    parts = fields.reshape(*fields.shape[:2], 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.bitwise_or.reduce(parts, axis=3).reshape(*fields.shape[:2], -1)


def _single_bits(fields: Bytes) -> Bytes:
    """[.., 256] of 0..1 -> [.., 32]."""
    return np.bitwise_or.reduce(fields.reshape(*fields.shape[:2], 8, 32) << np.arange(8, dtype=np.uint8)[:, None], axis=2)


def _six_bits(subs: Bytes, mins: Bytes) -> Bytes:
    """8 scales and 8 minimums of 6 bits in 12 bytes: the upper two bits of the last four stand above the first four."""
    four, high = np.uint8(4), np.uint8(6)
    first = subs[..., :4] | (subs[..., 4:] >> four) << high
    second = mins[..., :4] | (mins[..., 4:] >> four) << high
    return np.concatenate([first, second, (subs[..., 4:] & np.uint8(15)) | (mins[..., 4:] & np.uint8(15)) << four], axis=2)
