"""Searches the scales and zero points of weight groups that have the smallest squared rounding error."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..fake_quant.dispatch import grid_numbers
from ..fake_quant.range_reference import grid_of_range, group_range, shared_range
from ..spec import QuantSpec

FACTORS = tuple((60 - step) / 50 for step in range(48))
"""Factors on the range of a group in a search: 1.2 down to 0.26. Above 1 because the default divisor clips the largest weight."""
FITTED_FACTORS = tuple(factor for factor in FACTORS[::4] if factor >= 0.7)
"""Factors for scales that are fitted afterwards: 1.2 down to 0.72. Smaller ranges have a smaller error on the calibration text, but a
larger KL on other text (docs/lab-book.md)."""
_PIECE = 2**17  # weights per piece of a search: they and their errors fit in a core's cache


class SearchedScales(NamedTuple):
    """Scales and zero points of a weight [out, in]: w ~ (q - z) * s."""

    scales: Tensor
    """fp32 of ``spec.scale_shape(out, in)``, on the spec's grid."""
    zeros: Tensor | None
    """int8 in the shape of ``scales``; None when the spec is symmetric."""


@torch.no_grad()
def searched_grid(
    weight: Tensor, spec: QuantSpec, mask: Tensor | None = None, importance: Tensor | None = None, factors: Sequence[float] = FACTORS
) -> SearchedScales:
    """Finds for each group the scale and zero point with the smallest squared rounding error.

    Candidates are those of the group's range and of ``factors`` times its range. The search minimises sum_j h_j (w_j - s (q_j - z))^2,
    with the codes q that s and z give and s already on the grid of stored scales, so the compared values are the stored ones. Asymmetric
    specs are tried with the zero point of the scaled range, one more and one less. Of equal errors the first candidate wins, and the
    whole range comes first. The work space is a few pieces of 131,072 weights (at least one row).

    Args:
        weight: [out, in]; a group with NaN or infinite weights gets a scale of NaN, a group of zeros a scale of 1.
        spec: A quantization spec of kind int.
        mask: bool [out, in], True where a weight is kept; None keeps all.
        importance: h, fp32 [in], not negative: the diagonal of the Hessian; None = 1 for all.
        factors: Factors on the range.

    Raises:
        ValueError: the group size does not divide ``in``.
    """
    width = spec.group_width(weight.shape[1])
    kept = weight.detach().to(torch.float32)
    # pruned weights must not widen the range of their group
    if mask is not None:
        kept = kept * mask
    low, high = group_range(kept, None, width)
    # [out, groups, width]; shares are [1, groups, width]
    grouped = kept.reshape(weight.shape[0], -1, width)
    shares = None if importance is None else importance.to(torch.float32).view(1, *grouped.shape[1:])
    pieces = grouped.split(max(1, _PIECE // max(1, weight.shape[1])))
    # one scale per tensor: the errors of all pieces decide together
    if spec.group_size == "tensor":
        low, high = shared_range(low, high)
        return _search(pieces, low.view(1, 1), high.view(1, 1), spec, shares, factors)
    low, high = low.view(grouped.shape[:2]), high.view(grouped.shape[:2])
    ranges = zip(pieces, low.split(len(pieces[0])), high.split(len(pieces[0])))
    found = [_search([piece], smallest, largest, spec, shares, factors) for piece, smallest, largest in ranges]
    zeros = None if spec.symmetric else torch.cat([piece.zeros for piece in found if piece.zeros is not None])
    return SearchedScales(torch.cat([piece.scales for piece in found]), zeros)


def _search(
    pieces: Sequence[Tensor], low: Tensor, high: Tensor, spec: QuantSpec, shares: Tensor | None, factors: Sequence[float]
) -> SearchedScales:
    """The best scales and zero points of groups with the ranges low to high.

    ``pieces`` [rows, groups, width] is either one piece with a range per group, or all pieces of a weight with one range in total.
    """
    tried = _candidates(low, high, spec, factors)
    scales, zeros = next(tried)
    least = _error(pieces, scales, zeros, spec, shares)
    # a first error that is NaN would win every comparison below
    least.masked_fill_(torch.isnan(least), torch.inf)
    for scale, zero in tried:
        error = _error(pieces, scale, zero, spec, shares)
        # strictly: of equal errors the earlier candidate stays
        better = error < least
        least, scales, zeros = torch.where(better, error, least), torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return SearchedScales(scales, None if spec.symmetric else zeros)


def _candidates(low: Tensor, high: Tensor, spec: QuantSpec, factors: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the (scales, zero points) to try, those of the whole range first."""
    numbers = (spec.code_bits, spec.symmetric, spec.divisor_value, grid_numbers(spec))
    # the whole range first: a candidate must be strictly better to replace it, so it wins ties
    for factor in (1.0, *factors):
        scales, zeros = grid_of_range(low * factor, high * factor, *numbers)
        for shift in (0,) if spec.symmetric else (0, -1, 1):
            # int16 because int8 would wrap around at 127 + 1
            yield scales, (zeros.to(torch.int16) + shift).clamp_(spec.qmin, spec.qmax).to(torch.int8)


def _error(pieces: Sequence[Tensor], scales: Tensor, zeros: Tensor, spec: QuantSpec, shares: Tensor | None) -> Tensor:
    """Squared error per group, in the shape of ``scales``."""
    sums = [_squares(piece, scales.unsqueeze(2), zeros.unsqueeze(2), spec, shares).sum(2) for piece in pieces]
    # fp64, because one number sums the errors of a whole matrix
    return torch.stack([part.sum(dtype=torch.float64) for part in sums]).sum().view(1, 1) if scales.numel() == 1 else sums[0]


def _squares(grouped: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, shares: Tensor | None) -> Tensor:
    """Squared error per weight [rows, groups, width]: rounds, clamps, subtracts and squares in one buffer."""
    off = (grouped / scale).round_()
    if spec.symmetric:
        off.clamp_(spec.qmin, spec.qmax)
    else:
        shift = zero.to(torch.float32)
        torch.clamp(off, spec.qmin - shift, spec.qmax - shift, out=off)
    off.mul_(scale).sub_(grouped).square_()
    return off if shares is None else off.mul_(shares)
