"""Packs numbers of any width into rows of bytes, and ascending numbers in Elias-Fano form, on any device.

Elias-Fano (Elias 1974, Fano 1971) stores m ascending numbers below U in about m (2 + log2(U / m)) bits: the low bits directly, the high
bits as the gaps of a bit vector with m ones. Its size depends only on m and U, so all rows have the same size.
"""

import torch
from torch import Tensor

from .row_layout import ascending_width, low_width


def unfold_bits(numbers: Tensor, width: int) -> Tensor:
    """Bits of each number, lowest first: [n, k] int64 -> [n, k * width] uint8."""
    # [n, k, width]: one column per bit, then all bits of a row side by side
    shifts = torch.arange(width, device=numbers.device)
    return (numbers.unsqueeze(-1) >> shifts).bitwise_and(1).to(torch.uint8).flatten(1)


def fold_bits(bits: Tensor, width: int) -> Tensor:
    """The inverse of ``unfold_bits``: [n, k * width] uint8 -> [n, k] int64."""
    if not width:
        return bits.new_zeros(len(bits), 0, dtype=torch.int64)
    shifts = torch.arange(width, device=bits.device)
    return (bits.unflatten(1, (-1, width)).to(torch.int64) << shifts).sum(-1)


def to_bytes(bits: Tensor) -> Tensor:
    """[n, b] bits -> [n, ceil(b / 8)] uint8, the last byte filled with zeros."""
    return fold_bits(torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8)), 8).to(torch.uint8)


def from_bytes(data: Tensor) -> Tensor:
    """[n, k] uint8 -> [n, 8 k] bits, uint8."""
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    return (data.unsqueeze(-1) >> shifts).bitwise_and(1).flatten(1)


def unfold_ascending(numbers: Tensor, limit: int) -> Tensor:
    """Elias-Fano bits of rows of ascending numbers: [n, m] int64 in [0, limit], repeats allowed -> [n, ascending_width] uint8."""
    rows, count = numbers.shape
    low = low_width(count, limit)
    # the i-th one at high part + i: distinct places even where high parts repeat
    ones = (numbers >> low) + torch.arange(count, device=numbers.device)
    high = torch.zeros(rows, ascending_width(count, limit) - count * low, dtype=torch.uint8, device=numbers.device)
    high.scatter_(1, ones, 1)
    lows = numbers & ((1 << low) - 1)
    # parts of fixed widths, so the reader needs no lengths
    return torch.cat([unfold_bits(lows, low), high], 1) if low else high


def fold_ascending(bits: Tensor, count: int, limit: int) -> Tensor:
    """The inverse of ``unfold_ascending``: [n, m] int64.

    Raises:
        ValueError: a row does not have ``count`` ones, so these are not the bits of such numbers.
    """
    low = low_width(count, limit)
    lows, high = bits[:, : count * low], bits[:, count * low :]
    ones = high.sum(1, dtype=torch.int64)
    if wrong := int((ones != count).sum()):
        raise ValueError(f"{wrong:,} of {len(bits):,} rows do not have {count} numbers")
    # nonzero lists row by row, and each row has ``count`` ones, so the view below separates the rows
    places = high.nonzero()[:, 1]
    # undoes the shift by i above: what is left is the high part
    highs = places.view(len(bits), count) - torch.arange(count, device=bits.device)
    return (highs << low) + (fold_bits(lows, low) if low else 0)
