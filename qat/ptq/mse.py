"""Scales of weight groups for rounding after training: from the largest magnitude, or searched for the smallest squared error."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..fake_quant.reference import group_scales
from ..spec import QuantSpec

FACTORS = tuple((60 - step) / 50 for step in range(48))
"""What a search multiplies the absmax scale with: 1.2 down to 0.26. Above 1 because the default divisor clips the largest weight."""
COARSE_FACTORS = FACTORS[::4]
"""For scales that are fitted afterwards."""
_PIECE = 2**17  # weights searched at a time: they and their errors stay in a core's cache


@torch.no_grad()
def absmax_scales(weight: Tensor, spec: QuantSpec, mask: Tensor | None = None) -> Tensor:
    """The scales of ``fake_quant``: fp32 [out, groups], largest magnitude of a group / divisor, on the spec's grid.

    Args:
        weight: [out, in]; a group with NaN or infinite weights gets NaN, one of zeros 1.
        spec: A symmetric integer lattice with a scale per group or row.
        mask: bool [out, in], True where a weight is kept; None keeps all.

    Raises:
        ValueError: the group size does not divide ``in``.
    """
    return _on_grid(_grouped(weight, spec, mask).abs().amax(2), 1.0, spec)


@torch.no_grad()
def searched_scales(
    weight: Tensor, spec: QuantSpec, mask: Tensor | None = None, importance: Tensor | None = None, factors: Sequence[float] = FACTORS
) -> Tensor:
    """For each group the scale with the smallest squared rounding error, out of ``factors`` times its absmax scale, and that scale itself.

    Minimises sum_j h_j (w_j - s q_j)^2, q the codes that s gives and s on its grid already: what is compared is what is stored.
    The first of equal errors wins, the absmax scale before all. Work space is a few pieces of 131,072 weights (at least one row).

    Args:
        weight, spec, mask: As in ``absmax_scales``.
        importance: h, fp32 [in], not negative: the diagonal of the Hessian; None = 1 for all.

    Returns:
        fp32 [out, groups].
    """
    grouped = _grouped(weight, spec, mask)
    shares = None if importance is None else importance.to(torch.float32).view(1, *grouped.shape[1:])
    rows = max(1, _PIECE // max(1, weight.shape[1]))
    return torch.cat([_search(part, spec, shares, factors) for part in grouped.split(rows)])


def _grouped(weight: Tensor, spec: QuantSpec, mask: Tensor | None) -> Tensor:
    """fp32 [out, groups, width] of the weights that are kept."""
    kept = weight.detach().to(torch.float32)
    if mask is not None:
        kept = kept * mask
    return kept.reshape(weight.shape[0], -1, spec.group_width(weight.shape[1]))


def _on_grid(absmax: Tensor, factor: float, spec: QuantSpec) -> Tensor:
    grid = spec.grid
    return group_scales(absmax * factor, spec.divisor_value, grid.dropped_bits, grid.smallest, grid.largest)


def _search(grouped: Tensor, spec: QuantSpec, shares: Tensor | None, factors: Sequence[float]) -> Tensor:
    absmax = grouped.abs().amax(2)
    best = _on_grid(absmax, 1.0, spec)
    least = torch.full_like(best, torch.inf)
    work = torch.empty_like(grouped)
    for factor in (1.0, *factors):
        scale = _on_grid(absmax, factor, spec)
        torch.div(grouped, scale.unsqueeze(2), out=work)
        work.round_().clamp_(spec.qmin, spec.qmax).mul_(scale.unsqueeze(2)).sub_(grouped).square_()
        error = (work if shares is None else work.mul_(shares)).sum(2)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best
