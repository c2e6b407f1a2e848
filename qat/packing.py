"""Codes in 32-bit words, as the compressed-tensors format "pack-quantized" stores them.

A word holds 32 / b consecutive codes of one row, the first in the lowest bits, each as the unsigned number u = q + 2^(b-1). Rows
end on a word: unused high bits of the last word are zero. Only 2, 4 and 8 bits are written: for 3, 5, 6 and 7 the layout changed
under the same format name, and half of the readers still expect the old one.

``pack_bits`` packs every width from 2 to 8 as one dense stream of bits, code i of a row from bit i * b, across words where b does
not divide 32 (32 codes are b words): the newer of those layouts, and for 2, 4 and 8 bits the same words as ``pack_int32``.

Source: compressed-tensors ``compressors/pack_quantized/helpers.py``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .fake_quant.dispatch import Backend, use_kernel

PACKED_BITS = (2, 4, 8)
"""Code widths that divide a word, whose layout every version of the format shares."""


def _per_word(bits: int) -> int:
    if bits not in PACKED_BITS:
        raise ValueError(f"bits={bits} cannot be packed; use {', '.join(map(str, PACKED_BITS[:-1]))} or {PACKED_BITS[-1]}")
    return 32 // bits


def packed_width(in_features: int, bits: int) -> int:
    """Words per row: ceil(in_features * bits / 32)."""
    return -(-in_features // _per_word(bits))


def _check_codes(codes: Tensor, bits: int) -> None:
    offset = 1 << (bits - 1)
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise ValueError(f"codes must be an int8 matrix [out, in], not {codes.dtype} of shape {tuple(codes.shape)}")
    if codes.numel() and not -offset <= int(codes.min()) <= int(codes.max()) < offset:
        raise ValueError(f"codes span {int(codes.min())}..{int(codes.max())}; {bits} bits hold {-offset}..{offset - 1}")


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
    _check_codes(codes, bits)
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


def stream_width(in_features: int, bits: int) -> int:
    """Words per row of ``pack_bits``: ceil(in_features * bits / 32); ValueError for a width outside 2..8."""
    if bits not in range(2, 9):
        raise ValueError(f"bits={bits} cannot be packed; use 2 to 8")
    return -(-in_features * bits // 32)


def pack_bits(codes: Tensor, bits: int, *, backend: Backend = "auto") -> Tensor:
    """Pack signed codes of any width along the input axis as a dense stream of bits, lowest first.

    Args:
        codes: int8 [out, in], values in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 2 to 8.
        backend: 'auto' is the Triton kernel on CUDA and PyTorch elsewhere; both give the same words.

    Returns:
        int32 [out, ceil(in * bits / 32)].

    Raises:
        ValueError: another width, dtype or rank, or a code out of range (it would spill into its neighbours).
    """
    width = stream_width(codes.shape[-1], bits)
    _check_codes(codes, bits)
    if use_kernel(codes, backend, (torch.int8,)):
        from .packing_kernel import pack

        return pack(codes, bits, width)
    rows, columns = codes.shape
    blocks = -(-columns // 32)
    unsigned = F.pad(codes.to(torch.int32) + (1 << (bits - 1)), (0, blocks * 32 - columns)).view(rows, blocks, 32)
    words = torch.zeros(rows, blocks, bits, dtype=torch.int32, device=codes.device)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        words[..., word] |= unsigned[..., place] << shift
        if shift + bits > 32:
            words[..., word + 1] |= unsigned[..., place] >> (32 - shift)
    return words.view(rows, blocks * bits)[:, :width].contiguous()


def unpack_bits(packed: Tensor, bits: int, in_features: int, *, backend: Backend = "auto") -> Tensor:
    """Inverse of ``pack_bits``; unused bits of the last word are ignored.

    Args:
        packed: int32 [out, ceil(in_features * bits / 32)].
        bits: 2 to 8.
        in_features: Codes per row.
        backend: As in ``pack_bits``.

    Returns:
        int8 [out, in_features].

    Raises:
        ValueError: another width, dtype or shape.
    """
    width = stream_width(in_features, bits)
    if packed.dtype != torch.int32 or packed.ndim != 2 or packed.shape[1] != width:
        raise ValueError(f"{in_features} codes of {bits} bits need int32 [out, {width}], not {packed.dtype} of shape {tuple(packed.shape)}")
    if use_kernel(packed, backend, (torch.int32,)):
        from .packing_kernel import unpack

        return unpack(packed, bits, in_features)
    rows, blocks = packed.shape[0], -(-in_features // 32)
    words = F.pad(packed, (0, blocks * bits - width)).view(rows, blocks, bits)
    codes = torch.empty(rows, blocks, 32, dtype=torch.int8, device=packed.device)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        # the shift brings in copies of the sign bit: all that is not of this word is masked
        unsigned = (words[..., word] >> shift) & ((1 << min(bits, 32 - shift)) - 1)
        if shift + bits > 32:
            unsigned = (unsigned | words[..., word + 1] << (32 - shift)) & ((1 << bits) - 1)
        codes[..., place] = unsigned - (1 << (bits - 1))
    return codes.view(rows, blocks * 32)[:, :in_features].contiguous()
