"""Scales and zero points of weight groups for rounding after training, searched for the smallest squared error."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..fake_quant.dispatch import grid_numbers
from ..fake_quant.range_reference import grid_of_range, group_range, shared_range
from ..spec import QuantSpec

FACTORS = tuple((60 - step) / 50 for step in range(48))
"""What a search multiplies the range of a group with: 1.2 down to 0.26. Above 1 because the default divisor clips the largest weight."""
FITTED_FACTORS = tuple(factor for factor in FACTORS[::4] if factor >= 0.7)
"""For scales that are fitted afterwards: 1.2 down to 0.72. A range that is shrunk further has the smaller error on the calibration text and
the larger KL on other text (docs/lab-book.md)."""
_PIECE = 2**17  # weights searched at a time: they and their errors stay in a core's cache


class SearchedScales(NamedTuple):
    """Where the codes of a weight [out, in] lie: w ~ (q - z) * s."""

    scales: Tensor
    """fp32 of ``spec.scale_shape(out, in)``, on the spec's grid."""
    zeros: Tensor | None
    """int8 in the shape of ``scales``; None when the spec is symmetric."""


@torch.no_grad()
def searched_grid(
    weight: Tensor, spec: QuantSpec, mask: Tensor | None = None, importance: Tensor | None = None, factors: Sequence[float] = FACTORS
) -> SearchedScales:
    """For each group the lattice with the smallest squared rounding error, out of those of its range and of ``factors`` times its range.

    Minimises sum_j h_j (w_j - s (q_j - z))^2, q the codes that s and z give and s on its grid already: what is compared is what is
    stored. Asymmetric lattices are tried with the zero point of the shrunk range, one more and one less. The first of equal errors
    wins, the lattice of the whole range before all. Work space is a few pieces of 131,072 weights (at least one row).

    Args:
        weight: [out, in]; a group with NaN or infinite weights gets a scale of NaN, one of zeros 1.
        spec: A lattice of kind int.
        mask: bool [out, in], True where a weight is kept; None keeps all.
        importance: h, fp32 [in], not negative: the diagonal of the Hessian; None = 1 for all.
        factors: Shares of the range.

    Raises:
        ValueError: the group size does not divide ``in``.
    """
    width = spec.group_width(weight.shape[1])
    kept = weight.detach().to(torch.float32)
    if mask is not None:
        kept = kept * mask
    low, high = group_range(kept, None, width)
    grouped = kept.reshape(weight.shape[0], -1, width)
    shares = None if importance is None else importance.to(torch.float32).view(1, *grouped.shape[1:])
    pieces = grouped.split(max(1, _PIECE // max(1, weight.shape[1])))
    if spec.group_size == "tensor":
        low, high = shared_range(low, high)
        return _search(pieces, low.view(1, 1), high.view(1, 1), spec, shares, factors)
    low, high = low.view(grouped.shape[:2]), high.view(grouped.shape[:2])
    ranges = zip(pieces, low.split(len(pieces[0])), high.split(len(pieces[0])))
    found = [_search([piece], smallest, largest, spec, shares, factors) for piece, smallest, largest in ranges]
    zeros = None if spec.symmetric else torch.cat([lattice.zeros for lattice in found if lattice.zeros is not None])
    return SearchedScales(torch.cat([lattice.scales for lattice in found]), zeros)


def _search(
    pieces: Sequence[Tensor], low: Tensor, high: Tensor, spec: QuantSpec, shares: Tensor | None, factors: Sequence[float]
) -> SearchedScales:
    """The best lattice of groups with the ranges low to high; of one range for all ``pieces`` [rows, groups, width], or of one piece."""
    tried = _candidates(low, high, spec, factors)
    scales, zeros = next(tried)
    least = _error(pieces, scales, zeros, spec, shares)
    least.masked_fill_(torch.isnan(least), torch.inf)
    for scale, zero in tried:
        error = _error(pieces, scale, zero, spec, shares)
        better = error < least
        least, scales, zeros = torch.where(better, error, least), torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return SearchedScales(scales, None if spec.symmetric else zeros)


def _candidates(low: Tensor, high: Tensor, spec: QuantSpec, factors: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """(scales, zero points) to try, those of the whole range first."""
    numbers = (spec.bits, spec.symmetric, spec.divisor_value, grid_numbers(spec))
    for factor in (1.0, *factors):
        scales, zeros = grid_of_range(low * factor, high * factor, *numbers)
        for shift in (0,) if spec.symmetric else (0, -1, 1):
            yield scales, (zeros.to(torch.int16) + shift).clamp_(spec.qmin, spec.qmax).to(torch.int8)


def _error(pieces: Sequence[Tensor], scales: Tensor, zeros: Tensor, spec: QuantSpec, shares: Tensor | None) -> Tensor:
    """Squared error of each group, in the shape of ``scales``."""
    sums = [_squares(piece, scales.unsqueeze(2), zeros.unsqueeze(2), spec, shares).sum(2) for piece in pieces]
    return torch.stack([part.sum(dtype=torch.float64) for part in sums]).sum().view(1, 1) if scales.numel() == 1 else sums[0]


def _squares(grouped: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, shares: Tensor | None) -> Tensor:
    off = (grouped / scale).round_()
    if spec.symmetric:
        off.clamp_(spec.qmin, spec.qmax)
    else:
        shift = zero.to(torch.float32)
        torch.clamp(off, spec.qmin - shift, spec.qmax - shift, out=off)
    off.mul_(scale).sub_(grouped).square_()
    return off if shares is None else off.mul_(shares)
