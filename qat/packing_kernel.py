"""Packing of codes of 2 to 8 bits as a Triton kernel; ``packing.pack_bits`` is the reference.

A program makes a block of words, each from the codes that have bits in it. Nothing is shared between programs.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _pack_kernel(codes_ptr, words_ptr, num_words, COLUMNS, WIDTH, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """words int32 [rows, WIDTH] from codes int8 [rows, COLUMNS]."""
    # int64: a matrix may have more than 2^31 codes
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, word = index // WIDTH, index % WIDTH
    # the code that has the lowest bit of the word; it may begin in the word before
    first = word * 32 // BITS
    result = tl.zeros([BLOCK], tl.int32)
    # at most so many codes have a bit in one word
    for i in tl.static_range(32 // BITS + 2):
        column = first + i
        # the code's lowest bit within the word, negative if it is in the word before
        place = (column * BITS - word * 32).to(tl.int32)
        valid = (index < num_words) & (column < COLUMNS) & (place < 32)
        code = tl.load(codes_ptr + row * COLUMNS + column, mask=valid, other=0).to(tl.int32)
        unsigned = tl.where(valid, code + (1 << (BITS - 1)), 0)
        # tl.where computes both branches, and shifts outside 0..31 are undefined
        left = tl.minimum(tl.maximum(place, 0), 31)
        result |= tl.where(place < 0, unsigned >> tl.maximum(-place, 0), unsigned << left)
    tl.store(words_ptr + index, result, mask=index < num_words)


def pack(codes: Tensor, bits: int, width: int) -> Tensor:
    """int32 [out, width] from codes int8 [out, in] in range."""
    words = torch.empty(codes.shape[0], width, dtype=torch.int32, device=codes.device)
    if words.numel():
        with torch.cuda.device(codes.device) if codes.is_cuda else nullcontext():
            grid = (triton.cdiv(words.numel(), _BLOCK),)
            _pack_kernel[grid](codes.contiguous(), words, words.numel(), codes.shape[1], width, BITS=bits, BLOCK=_BLOCK)
    return words
