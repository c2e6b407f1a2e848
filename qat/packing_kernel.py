"""Packing and unpacking of codes of 2 to 8 bits as Triton kernels; ``packing.pack_bits`` and ``unpack_bits`` are the reference.

Packing, a program makes a block of words, each from the codes whose bits it holds; unpacking, a block of codes, each from the word
or two that hold it. Nothing is shared between programs.
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
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, word = index // WIDTH, index % WIDTH
    first = word * 32 // BITS
    result = tl.zeros([BLOCK], tl.int32)
    # at most so many codes have a bit in one word
    for i in tl.static_range(32 // BITS + 2):
        column = first + i
        place = (column * BITS - word * 32).to(tl.int32)
        valid = (index < num_words) & (column < COLUMNS) & (place < 32)
        code = tl.load(codes_ptr + row * COLUMNS + column, mask=valid, other=0).to(tl.int32)
        unsigned = tl.where(valid, code + (1 << (BITS - 1)), 0)
        left = tl.minimum(tl.maximum(place, 0), 31)
        result |= tl.where(place < 0, unsigned >> tl.maximum(-place, 0), unsigned << left)
    tl.store(words_ptr + index, result, mask=index < num_words)


@triton.jit
def _unpack_kernel(words_ptr, codes_ptr, num_codes, COLUMNS, WIDTH, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """codes int8 [rows, COLUMNS] from words int32 [rows, WIDTH]."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = index // COLUMNS, index % COLUMNS
    word = column * BITS // 32
    shift = (column * BITS % 32).to(tl.int32)
    valid = index < num_codes
    crosses = shift + BITS > 32
    low = tl.load(words_ptr + row * WIDTH + word, mask=valid, other=0)
    high = tl.load(words_ptr + row * WIDTH + word + 1, mask=valid & crosses, other=0)
    # copies of the sign bit come in from above: only the bits of this word are kept
    low_bits = tl.minimum(BITS, 32 - shift)
    unsigned = (low >> shift) & ((1 << low_bits) - 1)
    unsigned |= tl.where(crosses, high << (32 - tl.maximum(shift, 1)), 0)
    code = (unsigned & ((1 << BITS) - 1)) - (1 << (BITS - 1))
    tl.store(codes_ptr + index, code.to(tl.int8), mask=valid)


def _launch(kernel, source: Tensor, result: Tensor, columns: int, width: int, bits: int) -> Tensor:
    if result.numel():
        with torch.cuda.device(source.device) if source.is_cuda else nullcontext():
            kernel[(triton.cdiv(result.numel(), _BLOCK),)](
                source.contiguous(), result, result.numel(), columns, width, BITS=bits, BLOCK=_BLOCK
            )
    return result


def pack(codes: Tensor, bits: int, width: int) -> Tensor:
    """int32 [out, width] from codes int8 [out, in] in range."""
    words = torch.empty(codes.shape[0], width, dtype=torch.int32, device=codes.device)
    return _launch(_pack_kernel, codes, words, codes.shape[1], width, bits)


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """int8 [out, in_features] from words int32 [out, width]."""
    codes = torch.empty(packed.shape[0], in_features, dtype=torch.int8, device=packed.device)
    return _launch(_unpack_kernel, packed, codes, in_features, packed.shape[1], bits)
