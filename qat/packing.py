"""Packs codes into 32-bit words, as compressed-tensors ("pack-quantized") and GPTQ store them.

A row is a dense stream of bits: code i, as the unsigned number u = q + 2^(b-1), takes b bits from bit i * b on, lowest first, and crosses
words if b does not divide 32. Each row starts a new word; unused high bits of the last word are zero.

2, 4 and 8 bits have this layout in every release of compressed-tensors. 3, 5, 6 and 7 bits have it since 0.18; older readers expect
another one under the same format name.

Source: compressed-tensors ``compressors/pack_quantized/helpers.py``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .fake_quant.dispatch import Backend, use_kernel
from .packed_width import packed_width as packed_width


def _check_codes(codes: Tensor, bits: int) -> None:
    offset = 1 << (bits - 1)
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise ValueError(f"codes must be an int8 matrix [out, in], not {codes.dtype} of shape {tuple(codes.shape)}")
    if codes.numel() and not -offset <= int(codes.min()) <= int(codes.max()) < offset:
        raise ValueError(f"codes span {int(codes.min())}..{int(codes.max())}; {bits} bits hold {-offset}..{offset - 1}")


def pack_bits(codes: Tensor, bits: int, *, backend: Backend = "auto") -> Tensor:
    """Pack signed codes of any width along the input axis as a dense stream of bits, lowest first.

    Args:
        codes: int8 [out, in], values in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 2 to 8.
        backend: 'auto' is the Triton kernel on CUDA and PyTorch elsewhere; both give the same words.

    Returns:
        int32 [out, ceil(in * bits / 32)].

    Raises:
        ValueError: unsupported width, dtype or rank, or a code out of range (it would overwrite its neighbours).
    """
    width = packed_width(codes.shape[-1], bits)
    _check_codes(codes, bits)
    if use_kernel(codes, backend, (torch.int8,)):
        from .packing_kernel import pack

        return pack(codes, bits, width)
    rows, columns = codes.shape
    # the smallest block of codes that fills whole words: 8 codes of 4 bits are 1 word, 32 codes of 3 bits are 3
    common = math.gcd(bits, 32)
    block_codes, block_words = 32 // common, bits // common
    blocks = -(-columns // block_codes)
    # u = q + 2^(b-1): [out, blocks, codes of a block]; padding beyond the row is u = 0
    unsigned = F.pad(codes.to(torch.int32) + (1 << (bits - 1)), (0, blocks * block_codes - columns)).view(rows, blocks, block_codes)
    words = torch.zeros(rows, blocks, block_words, dtype=torch.int32, device=codes.device)
    for place in range(block_codes):
        word, shift = divmod(place * bits, 32)
        # the last code may set the sign bit: the word is the same 32 bits, read as a negative number
        words[..., word] |= unsigned[..., place] << shift
        # the code crosses into the next word: its high bits go there
        if shift + bits > 32:
            # u < 256 is positive, so the shift brings in zeros
            words[..., word + 1] |= unsigned[..., place] >> (32 - shift)
    # without the words of the last block that hold no code
    return words.view(rows, blocks * block_words)[:, :width].contiguous()
