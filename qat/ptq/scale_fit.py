"""Fits scales to given codes, so that the outputs of the quantized weight are as near as possible to those of the unrounded weight.

For given codes the output error of a row is a quadratic function of its scales. Its minimum is the solution d of a linear system with one
unknown per group of the row; d is added to the scales with which the codes were made:

    A d = b     A_gh = sum_{i in g, j in h} q_i H_ij q_j     b_g = sum_{i in g} q_i (H (w - s q))_i

(q - z instead of q if the spec has zero points.) GPTQ's pass over the columns already gives (w - s q) H and the error itself. The fit
lowers the error by 2 b d - d A d.

Rounding again with these scales and fitting again lowers the error further; the two steps alternate as in Lloyd's algorithm (IEEE Trans.
Inf. Theory 28, 1982), with GPTQ as the rounding step.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...models.calibration.factor import Factor
from ..fake_quant.absmax_reference import group_scales
from ..ptq_limits import TWICE_TO
from ..spec import QuantSpec
from .gptq import gptq_pass
from .mse import SearchedScales

_HOLD = 0.01
"""Ridge that keeps the fitted scales near the scales before, as a share of each group's own curvature. Without it, groups with nearly the
same inputs share their error at random, and the fit follows the calibration text too closely."""
_PIECE = 2**20  # numbers of a matrix per piece of work: 4 MB
_FARTHEST = 4.0  # largest factor of change: a fitted scale that changes more comes from a nearly singular system


@torch.no_grad()
def fitted_scales(
    columns: Tensor, scales: Tensor, pull: Tensor, hessian: Tensor, spec: QuantSpec, damping: float = 0.0, zeros: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fits scales to given codes by least squares over the outputs.

    Args:
        columns: int8 [in, out]: the codes.
        scales: fp32 [out, groups], or [1, 1] for the whole matrix: the scales with which the codes were made. A group keeps its scale if
            all its codes are zero, or if the fitted scale is not positive and within a factor of 4 of it.
        pull: fp32 [in, out]: H (W - Q)^T for these codes and scales, H damped.
        hessian: fp32 [in, in], symmetric, not damped.
        spec: Gives the grid of stored scales.
        damping: Added to the Hessian's diagonal.
        zeros: int8 zero points in the shape of ``scales``, subtracted from the codes; None = no zero points.

    Returns:
        (scales, gain): scales fp32 in the shape of ``scales`` on the spec's grid; gain fp64 [out], by how much they lower each row's damped
        squared error ([1] for all rows together if they share one scale). Rows without a gain keep their scales.
    """
    pieces = _equations(columns, scales, pull, hessian, damping, zeros)
    if scales.shape[0] == columns.shape[1]:
        solved = [_solve(matrix, target, held, spec) for matrix, target, held in pieces]
    else:
        # one scale for all rows minimises the sum of their errors, so the systems are added up
        sums = [(matrix.sum(0, keepdim=True), target.sum(0, keepdim=True)) for matrix, target, _ in pieces]
        solved = [_solve(torch.stack([own for own, _ in sums]).sum(0), torch.stack([own for _, own in sums]).sum(0), scales, spec)]
    return torch.cat([fitted for fitted, _ in solved]), torch.cat([gain for _, gain in solved])


def _equations(
    columns: Tensor, scales: Tensor, pull: Tensor, hessian: Tensor, damping: float, zeros: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields (A [rows, groups, groups] with its lower triangle filled, b [rows, groups], scales) in fp32 for some rows after the other."""
    groups, (inputs, outputs) = scales.shape[1], columns.shape
    # the matrices A of all rows at once would take out * groups^2 numbers
    rows = max(1, _PIECE // max(inputs, groups**2))
    for first in range(0, outputs, rows):
        piece = slice(first, min(first + rows, outputs))
        own = piece if scales.shape[0] == outputs else slice(None)
        # q - z: [in, rows]
        numbers = columns[:, piece].to(torch.float32)
        if zeros is not None:
            numbers.view(groups, -1, numbers.shape[1]).sub_(zeros[own].T.unsqueeze(1))
        # [in, rows] -> [groups, width, rows] -> [rows, groups]
        target = (pull[:, piece] * numbers).view(groups, -1, numbers.shape[1]).sum(1).T
        yield _curvature(numbers, groups, hessian, damping), target, scales[own]


def _curvature(numbers: Tensor, groups: int, hessian: Tensor, damping: float) -> Tensor:
    """A of some rows, whose q - z are ``numbers`` [in, rows]; overwrites ``numbers``."""
    width, rows = len(numbers) // groups, numbers.shape[1]
    lower = torch.zeros(rows, groups, groups, device=numbers.device)
    for group in range(groups):
        first = group * width
        # only groups from this one on: the rest of the lower triangle is done, and A is symmetric
        # [in - first, width] @ [width, rows]
        product = hessian[first:, first : first + width] @ numbers[first : first + width]
        lower[:, group:, group] = product.mul_(numbers[first:]).view(groups - group, width, rows).sum(1).T
    own = lower.diagonal(dim1=1, dim2=2)
    own += damping * numbers.square_().view(groups, width, rows).sum(1).T
    return lower


def _solve(lower: Tensor, target: Tensor, scales: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """(fitted scales [rows, groups], gain [rows]) of some rows; overwrites ``lower``."""
    own = lower.diagonal(dim1=1, dim2=2)
    curvature = own.clone()
    # a group of zero codes has no curvature: a 1 keeps the system solvable, and the group's d is 0
    own += (_HOLD * curvature).masked_fill_(curvature <= 0, 1.0)
    # rows whose matrix is not positive definite come out as noise or NaN: ``usable`` and ``gain`` refuse them
    solved = scales + torch.cholesky_solve(target.unsqueeze(2), torch.linalg.cholesky_ex(lower)[0]).squeeze(2)
    usable = (solved > scales / _FARTHEST) & (solved < scales * _FARTHEST)
    grid = spec.grid
    fitted = group_scales(torch.where(usable, solved, scales), 1.0, grid.dropped_bits, grid.smallest, grid.largest)
    # only the lower triangle is filled: with half its diagonal, d A d is twice the product with it
    own.copy_(curvature / 2)
    moved = (fitted - scales).double().unsqueeze(2)
    # of the scales as they are stored, after the grid and without the ridge
    gain = (2 * moved * (target.unsqueeze(2) - lower.double() @ moved)).sum((1, 2))
    helped = gain > 0
    return torch.where(helped.unsqueeze(1), fitted, scales), torch.where(helped, gain, 0.0)


@torch.no_grad()
def fitted_codes(
    weight: Tensor, grid: SearchedScales, hessian: Tensor, factor: Factor, spec: QuantSpec, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rounds by GPTQ and fits the scales to the codes; does both a second time below 4 bits and for pruned weights.

    Rows that the second turn does not improve keep the result of the first (all rows together if they share one scale). Zero points do
    not change.

    Args:
        weight: fp32 [out, in], finite.
        grid: The first scales, and the zero points.
        hessian: fp32 [in, in] as given to ``factorize``.
        factor: The factor of that Hessian.
        spec: A quantization spec of kind int.
        mask: As in ``gptq_codes``.

    Returns:
        (codes int8 [out, in], scales fp32 in the shape of ``grid.scales``).
    """
    codes, scales, error = _turn(weight, grid.scales, grid.zeros, hessian, factor, spec, mask)
    if (spec.bits > TWICE_TO and mask is None) or torch.equal(scales, grid.scales):
        return codes, scales
    again, fitted, left = _turn(weight, scales, grid.zeros, hessian, factor, spec, mask)
    # one scale belongs to all rows, so their codes cannot be chosen row by row
    if len(scales) < len(weight):
        return (again, fitted) if left.sum() < error.sum() else (codes, scales)
    # not strictly better: the first turn is kept
    worse = left >= error
    again[worse], fitted[worse] = codes[worse], scales[worse]
    return again, fitted


def _turn(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, hessian: Tensor, factor: Factor, spec: QuantSpec, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One turn of rounding and fitting: (codes, fitted scales, damped squared error with them: fp64 [out] or [1])."""
    done = gptq_pass(weight, scales, factor, spec, mask, zeros)
    # the same damping as in the factor, so that error and gain are of one matrix
    damping = factor.damping * float(hessian.diagonal().mean())
    fitted, gain = fitted_scales(done.columns, scales, done.pull(factor), hessian, spec, damping, zeros)
    error = done.energy(factor)
    return done.codes, fitted, (error if len(gain) == len(error) else error.sum(0, keepdim=True)) - gain
