"""Scales fitted to codes: of all scales, those with which these codes give the outputs nearest to the unrounded weight's.

For given codes the output error of a row is a quadratic function of its scales. Its least point is found by solving one equation in as
many unknowns as the row has groups, for what is to be added to the scales that the codes were made with:

    A d = b     A_gh = sum_{i in g, j in h} q_i H_ij q_j     b_g = sum_{i in g} q_i (H (w - s q))_i

(q - z in the place of q where the lattice has zero points.) (w - s q) H is what GPTQ's pass over the columns leaves behind, and so is the
error itself; fitting takes off 2 b d - d A d.

Rounding again with these scales and fitting again lowers the error further: the two take turns as in Lloyd's algorithm (IEEE Trans. Inf.
Theory 28, 1982), with GPTQ as the rounding.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..fake_quant.absmax_reference import group_scales
from ..ptq_limits import TWICE_TO
from ..spec import QuantSpec
from .gptq import Factor, gptq_pass
from .mse import SearchedScales

_HOLD = 0.01
"""Pull to the scales before, as a share of each group's own curvature: groups whose inputs are nearly alike share their error at random
otherwise, and calibration text is not all text."""
_PIECE = 2**20  # numbers of a matrix that is worked on at a time: 4 MB
_FARTHEST = 4.0  # a fitted scale that differs by more is no better description of its group but a sign of a near-singular equation


@torch.no_grad()
def fitted_scales(
    columns: Tensor, scales: Tensor, pull: Tensor, hessian: Tensor, spec: QuantSpec, damping: float = 0.0, zeros: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The scales nearest to the least squared output error for given codes, and what they gain.

    Args:
        columns: int8 [in, out]: the codes.
        scales: fp32 [out, groups], or [1, 1] for the whole matrix, that the codes were made with; a group keeps its own where all its
            codes are zero, or where the fitted one is not a positive number within a factor of 4 of it.
        pull: fp32 [in, out]: H (W - Q)^T for these codes and scales, H damped.
        hessian: fp32 [in, in], symmetric, not damped.
        spec: Of the grid.
        damping: Added to the Hessian's diagonal.
        zeros: int8 zero points in the shape of ``scales``; the codes' q becomes q - z.

    Returns:
        (scales fp32 in the shape of ``scales`` on the spec's grid, by how much they lower each row's damped squared error: fp64 [out], or
        [1] for all rows together). Rows that would gain nothing keep their scales.
    """
    pieces = _equations(columns, scales, pull, hessian, damping, zeros)
    if scales.shape[0] == columns.shape[1]:
        solved = [_solve(matrix, target, held, spec) for matrix, target, held in pieces]
    else:
        # one scale for all rows: the sum of their errors is what it minimises
        sums = [(matrix.sum(0, keepdim=True), target.sum(0, keepdim=True)) for matrix, target, _ in pieces]
        solved = [_solve(torch.stack([own for own, _ in sums]).sum(0), torch.stack([own for _, own in sums]).sum(0), scales, spec)]
    return torch.cat([fitted for fitted, _ in solved]), torch.cat([gain for _, gain in solved])


def _equations(
    columns: Tensor, scales: Tensor, pull: Tensor, hessian: Tensor, damping: float, zeros: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(A [rows, groups, groups] with its lower triangle filled, b [rows, groups], their scales) of all rows, some at a time; fp32."""
    groups, (inputs, outputs) = scales.shape[1], columns.shape
    rows = max(1, _PIECE // max(inputs, groups**2))
    for first in range(0, outputs, rows):
        piece = slice(first, min(first + rows, outputs))
        own = piece if scales.shape[0] == outputs else slice(None)
        numbers = columns[:, piece].to(torch.float32)
        if zeros is not None:
            numbers.view(groups, -1, numbers.shape[1]).sub_(zeros[own].T.unsqueeze(1))
        target = (pull[:, piece] * numbers).view(groups, -1, numbers.shape[1]).sum(1).T
        yield _curvature(numbers, groups, hessian, damping), target, scales[own]


def _curvature(numbers: Tensor, groups: int, hessian: Tensor, damping: float) -> Tensor:
    """A of some rows, whose q - z are ``numbers`` [in, rows]."""
    width, rows = len(numbers) // groups, numbers.shape[1]
    lower = torch.zeros(rows, groups, groups, device=numbers.device)
    for group in range(groups):
        first = group * width
        product = hessian[first:, first : first + width] @ numbers[first : first + width]
        lower[:, group:, group] = product.mul_(numbers[first:]).view(groups - group, width, rows).sum(1).T
    own = lower.diagonal(dim1=1, dim2=2)
    own += damping * numbers.square_().view(groups, width, rows).sum(1).T
    return lower


def _solve(lower: Tensor, target: Tensor, scales: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """(fitted scales held to those before, [rows, groups], gain [rows]) of some rows."""
    own = lower.diagonal(dim1=1, dim2=2)
    curvature = own.clone()
    own += (_HOLD * curvature).masked_fill_(curvature <= 0, 1.0)
    # noise or NaN in a row whose matrix is not positive definite
    solved = scales + torch.cholesky_solve(target.unsqueeze(2), torch.linalg.cholesky_ex(lower)[0]).squeeze(2)
    usable = (solved > scales / _FARTHEST) & (solved < scales * _FARTHEST)
    grid = spec.grid
    fitted = group_scales(torch.where(usable, solved, scales), 1.0, grid.dropped_bits, grid.smallest, grid.largest)
    own.copy_(curvature / 2)  # d A d is twice that of the lower triangle with half its diagonal
    moved = (fitted - scales).double().unsqueeze(2)
    gain = (2 * moved * (target.unsqueeze(2) - lower.double() @ moved)).sum((1, 2))
    helped = gain > 0
    return torch.where(helped.unsqueeze(1), fitted, scales), torch.where(helped, gain, 0.0)


@torch.no_grad()
def fitted_codes(
    weight: Tensor, lattice: SearchedScales, hessian: Tensor, factor: Factor, spec: QuantSpec, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """GPTQ's codes and scales fitted to them; below 4 bits, and of pruned weights, GPTQ's codes for those, and scales fitted once more.

    Rows that the second turn does not help keep what the first has given (all rows together where they share one scale). Zero points stay.

    Args:
        weight: fp32 [out, in], finite.
        lattice: To begin with.
        hessian: fp32 [in, in] as given to ``factorize``.
        factor: Of that Hessian.
        spec: A lattice of kind int.
        mask: As in ``gptq_codes``.

    Returns:
        (codes int8 [out, in], scales fp32 in the shape of the lattice's).
    """
    codes, scales, error = _turn(weight, lattice.scales, lattice.zeros, hessian, factor, spec, mask)
    if (spec.bits > TWICE_TO and mask is None) or torch.equal(scales, lattice.scales):
        return codes, scales
    again, fitted, left = _turn(weight, scales, lattice.zeros, hessian, factor, spec, mask)
    if len(scales) < len(weight):
        return (again, fitted) if left.sum() < error.sum() else (codes, scales)
    worse = left >= error
    again[worse], fitted[worse] = codes[worse], scales[worse]
    return again, fitted


def _turn(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, hessian: Tensor, factor: Factor, spec: QuantSpec, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes for these scales, scales fitted to them, the damped squared error of those: fp64 [out] or [1])."""
    done = gptq_pass(weight, scales, factor, spec, mask, zeros)
    damping = factor.damping * float(hessian.diagonal().mean())
    fitted, gain = fitted_scales(done.columns, scales, done.pull(factor), hessian, spec, damping, zeros)
    error = done.energy(factor)
    return done.codes, fitted, (error if len(gain) == len(error) else error.sum(0, keepdim=True)) - gain
