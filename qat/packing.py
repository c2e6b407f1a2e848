"""Codes in 32-bit words, as the compressed-tensors format "pack-quantized" stores them.

A word holds 32 / b consecutive codes of one row, the first in the lowest bits, each as the unsigned number u = q + 2^(b-1). Rows
end on a word: unused high bits of the last word are zero. Only 2, 4 and 8 bits are written: for 3, 5, 6 and 7 the layout changed
under the same format name, and half of the readers still expect the old one.

Source: compressed-tensors ``compressors/pack_quantized/helpers.py``.
"""

import torch
from torch import Tensor

PACKED_BITS = (2, 4, 8)
"""Code widths that divide a word, whose layout every version of the format shares."""


def _per_word(bits: int) -> int:
    if bits not in PACKED_BITS:
        raise ValueError(f"bits={bits} cannot be packed; use {', '.join(map(str, PACKED_BITS[:-1]))} or {PACKED_BITS[-1]}")
    return 32 // bits


def packed_width(in_features: int, bits: int) -> int:
    """Words per row: ceil(in_features * bits / 32)."""
    return -(-in_features // _per_word(bits))


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes into words along the input axis.

    Args:
        codes: int8 [out, in], values in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 2, 4 or 8.

    Returns:
        int32 [out, ceil(in * bits / 32)].

    Raises:
        ValueError: another width, dtype or rank, or a code out of range (it would spill into its neighbours).
    """
    per_word, offset = _per_word(bits), 1 << (bits - 1)
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise ValueError(f"codes must be an int8 matrix [out, in], not {codes.dtype} of shape {tuple(codes.shape)}")
    if codes.numel() and not -offset <= int(codes.min()) <= int(codes.max()) < offset:
        raise ValueError(f"codes span {int(codes.min())}..{int(codes.max())}; {bits} bits hold {-offset}..{offset - 1}")
    packed = torch.zeros(codes.shape[0], packed_width(codes.shape[1], bits), dtype=torch.int32, device=codes.device)
    for place in range(per_word):
        column = codes[:, place::per_word].to(torch.int32) + offset
        packed[:, : column.shape[1]] |= column << (place * bits)
    return packed


def unpack_int32(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Inverse of ``pack_int32``; unused bits of the last word are ignored.

    Args:
        packed: int32 [out, ceil(in_features * bits / 32)].
        bits: 2, 4 or 8.
        in_features: Codes per row.

    Returns:
        int8 [out, in_features].

    Raises:
        ValueError: another width, dtype or shape.
    """
    per_word = _per_word(bits)
    if packed.dtype != torch.int32 or packed.ndim != 2 or packed.shape[1] != packed_width(in_features, bits):
        raise ValueError(
            f"{in_features} codes of {bits} bits need int32 [out, {packed_width(in_features, bits)}], "
            f"not {packed.dtype} of shape {tuple(packed.shape)}"
        )
    codes = torch.empty(packed.shape[0], in_features, dtype=torch.int8, device=packed.device)
    for place in range(min(per_word, in_features)):
        column = codes[:, place::per_word]
        unsigned = (packed[:, : column.shape[1]] >> (place * bits)) & ((1 << bits) - 1)
        column.copy_(unsigned - (1 << (bits - 1)))
    return codes
