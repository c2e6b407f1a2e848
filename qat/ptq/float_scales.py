"""Searches the scales of floats and quantiles that have the smallest squared rounding error.

    kind        candidates of a group (absmax a)                                            first, which wins ties
    nf4         a f on the spec's grid, f of ``FACTORS``                                    f = 1
    fp8_e4m3    a f / 448 on the spec's grid, f of ``FP8_FACTORS``                          f = 1
    mxfp4       2^(e + k), k = 0, 1, -1, with the exponent e of ``float_reference.py``      k = 0
    nvfp4       e4m3(a f / 6 * G) / G, f of ``NVFP4_FACTORS``; G = 256 * 6 / the absmax     f = 1
                of the matrix

Of nvfp4's factors, 1 maps the largest magnitude of a group to 6, and 1.5 to 4, below which codes lie closer: four over six
(Cook et al., arXiv 2512.02010). G leaves e4m3 room for 1.5 times the largest scale: 384 of 448.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..fake_quant.absmax_reference import group_scales
from ..fake_quant.dispatch import grid_numbers
from ..fake_quant.float_reference import LIMITS, block_scales, nearest_value, power_of_two_scales
from ..spec import QuantSpec

FACTORS = tuple((60 - step) / 50 for step in range(25))
"""nf4: factors on the absmax, 1.2 down to 0.72."""
FP8_FACTORS = tuple(2 ** (step / 8) for step in range(8))
"""fp8: factors from 1 to 2, where the same numbers come again but for subnormals; smaller ones clip, and gain nothing."""
NVFP4_FACTORS = (1.0, 1.5)
EXPONENTS = (0, 1, -1)
_ROOM = 256.0 * 6.0
_PIECE = 2**17  # weights per piece of a search: they and their errors fit in a core's cache


class FloatScales(NamedTuple):
    """Scales of a weight [out, in] of floats."""

    divides: Tensor
    """fp32 of ``spec.scale_shape(out, in)``: w ~ q * divides."""
    stored: Tensor
    """The same scales as they are stored: values of e4m3 for nvfp4, else equal to ``divides``."""
    whole: Tensor | None
    """fp32 [1]: divides = stored / whole (nvfp4); None for the other kinds."""


@torch.no_grad()
def searched_floats(
    weight: Tensor, spec: QuantSpec, mask: Tensor | None = None, importance: Tensor | None = None, factors: Sequence[float] | None = None
) -> FloatScales:
    """Finds for each group the scale with the smallest sum_j h_j (w_j - s q_j)^2, s as it is stored and q the codes that it gives.

    Args:
        weight: [out, in], finite; groups of zeros get the scale 1. Weights that share a global scale are stacked along out.
        spec: A quantization spec of another kind than int.
        mask: bool [out, in], True where a weight is kept; None keeps all.
        importance: h, fp32 [in], not negative; None = 1 for all.
        factors: Factors on the absmax (not of mxfp4); None = those of the kind.

    Raises:
        ValueError: the group size does not divide ``in``.
    """
    width = spec.group_width(weight.shape[1])
    kept = weight.detach().to(torch.float32)
    if mask is not None:
        kept = kept * mask
    # [out, groups, width]; shares are [1, groups, width]
    grouped = kept.reshape(weight.shape[0], -1, width)
    shares = None if importance is None else importance.to(torch.float32).view(1, *grouped.shape[1:])
    absmax = grouped.abs().amax(2)
    whole = _global_scale(absmax) if spec.kind == "nvfp4" else None
    pieces = grouped.split(max(1, _PIECE // max(1, weight.shape[1])))
    if spec.group_size == "tensor":
        # one scale: the errors of all pieces decide together
        stored = _search(pieces, absmax.amax().view(1, 1), spec, whole, shares, factors)
    else:
        found = [_search([piece], own, spec, whole, shares, factors) for piece, own in zip(pieces, absmax.split(len(pieces[0])))]
        stored = torch.cat(found)
    return FloatScales(stored if whole is None else stored / whole, stored, whole)


def _global_scale(absmax: Tensor) -> Tensor:
    """fp32 [1]: G, 1 for a matrix of zeros."""
    largest = absmax.amax().view(1)
    # clamped, because a tiny absmax would make it infinite
    whole = (torch.full_like(largest, _ROOM) / largest).clamp_(max=torch.finfo(torch.float32).max)
    return whole.masked_fill_(largest == 0, 1.0)


def _search(
    pieces: Sequence[Tensor], absmax: Tensor, spec: QuantSpec, whole: Tensor | None, shares: Tensor | None, factors: Sequence[float] | None
) -> Tensor:
    """The best stored scales for groups with these absmax: one piece with a scale per group, or all pieces with one in total."""
    tried = _candidates(absmax, spec, whole, factors)
    best = next(tried)
    least = _error(pieces, best, spec.kind, whole, shares)
    for scale in tried:
        error = _error(pieces, scale, spec.kind, whole, shares)
        # strictly: of equal errors the earlier candidate stays
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, scale, best)
    return best


def _candidates(absmax: Tensor, spec: QuantSpec, whole: Tensor | None, factors: Sequence[float] | None) -> Iterator[Tensor]:
    """Yields stored scales to try, in the shape of ``absmax``."""
    if spec.kind == "mxfp4":
        first = power_of_two_scales(absmax)
        for exponent in EXPONENTS:
            # beyond the ends there is no other exponent to try
            moved = (first.double() * 2.0**exponent).clamp(2.0**-127, 2.0**127).to(torch.float32)
            yield moved.masked_fill(absmax == 0, 1.0)
        return
    dropped, smallest, largest = grid_numbers(spec)
    own: dict[str, Sequence[float]] = {"nf4": (1.0, *FACTORS), "fp8_e4m3": FP8_FACTORS, "nvfp4": NVFP4_FACTORS}
    for factor in factors or own[spec.kind]:
        if whole is not None:
            yield block_scales(absmax * factor, whole)
        else:
            yield group_scales(absmax * factor, LIMITS[spec.kind], int(dropped), smallest, largest)


def _error(pieces: Sequence[Tensor], stored: Tensor, kind: str, whole: Tensor | None, shares: Tensor | None) -> Tensor:
    """Squared error per group, in the shape of ``stored``."""
    scale = (stored if whole is None else stored / whole).unsqueeze(2)
    sums = [_squares(piece, scale, kind, shares).sum(2) for piece in pieces]
    # fp64, because one number sums the errors of a whole matrix
    return torch.stack([part.sum(dtype=torch.float64) for part in sums]).sum().view(1, 1) if stored.numel() == 1 else sums[0]


def _squares(grouped: Tensor, scale: Tensor, kind: str, shares: Tensor | None) -> Tensor:
    """Squared error per weight [rows, groups, width]."""
    limit = LIMITS[kind]
    off = nearest_value((grouped / scale).clamp_(-limit, limit), kind).mul_(scale).sub_(grouped).square_()
    return off if shares is None else off.mul_(shares)
