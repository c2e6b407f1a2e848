"""Scales fitted to codes: of all scales, those with which these codes give the outputs nearest to the unrounded weight's.

For given codes the output error of a row is a quadratic function of its scales, and its least point is found by solving one equation in
as many unknowns as the row has groups:

    A s = b     A_gh = sum_{i in g, j in h} q_i H_ij q_j     b_g = sum_{i in g} q_i (H w)_i

(q - z in the place of q where the lattice has zero points.)

Rounding again with these scales and fitting again lowers the error further: the two take turns as in Lloyd's algorithm (IEEE Trans. Inf.
Theory 28, 1982), with GPTQ as the rounding.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..fake_quant import dequantize
from ..fake_quant.reference import group_scales
from ..spec import QuantSpec
from .gptq import Factor, gptq_codes
from .mse import Lattice
from .report import row_energy

_HOLD = 0.01
"""Pull to the scales before, as a share of each group's own curvature: groups whose inputs are nearly alike share their error at random
otherwise, and calibration text is not all text."""
_PIECE = 2**21  # numbers of a matrix that is worked on at a time: 8 MB
_FARTHEST = 4.0  # a fitted scale that differs by more is no better description of its group but a sign of a near-singular equation


@torch.no_grad()
def fitted_scales(
    weight: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor, spec: QuantSpec, damping: float = 0.0, zeros: Tensor | None = None
) -> Tensor:
    """The scales nearest to the least squared output error for these codes.

    Args:
        weight: fp32 [out, in].
        codes: int8 [out, in].
        scales: fp32 [out, groups], or [1, 1] for the whole matrix, that the codes were made with; a group keeps its own where all its
            codes are zero, or where the fitted one is not a positive number within a factor of 4 of it.
        hessian: fp32 [in, in], symmetric.
        spec: Of the grid.
        damping: Added to the Hessian's diagonal.
        zeros: int8 zero points in the shape of ``scales``; the codes' q becomes q - z.

    Returns:
        fp32 in the shape of ``scales`` on the spec's grid.
    """
    pieces = _pieces(weight, codes, scales, zeros)
    if scales.shape[0] == weight.shape[0]:
        solved = torch.cat([_solve(*_equations(some, q, s.shape[1], hessian, damping), s) for some, q, s in pieces])
    else:
        # one scale for all rows: the sum of their errors is what it minimises
        sums = [[part.sum(0, keepdim=True) for part in _equations(some, q, 1, hessian, damping)] for some, q, _ in pieces]
        solved = _solve(torch.stack([matrix for matrix, _ in sums]).sum(0), torch.stack([target for _, target in sums]).sum(0), scales)
    usable = (solved > scales / _FARTHEST) & (solved < scales * _FARTHEST)
    grid = spec.grid
    return group_scales(torch.where(usable, solved, scales), 1.0, grid.dropped_bits, grid.smallest, grid.largest)


def _pieces(weight: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(weights, q - z, both fp32 [some rows, in], their scales) of all rows, some at a time."""
    rows = max(1, _PIECE // max(weight.shape[1], scales.shape[1] ** 2))
    for first in range(0, len(weight), rows):
        own = slice(first, first + rows) if scales.shape[0] == weight.shape[0] else slice(None)
        held = scales[own]
        numbers = dequantize(codes[first : first + rows], torch.ones_like(held), None if zeros is None else zeros[own])
        yield weight[first : first + rows], numbers, held


def _equations(weight: Tensor, numbers: Tensor, groups: int, hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(A [rows, groups, groups] with its lower triangle filled, b [rows, groups]) of some rows; fp32."""
    rows, width = len(weight), weight.shape[1] // groups
    target = torch.addmm(weight, weight, hessian, beta=damping).mul_(numbers).view(rows, groups, width).sum(2)
    lower = torch.zeros(rows, groups, groups, device=weight.device)
    for group in range(groups):
        first = group * width
        product = numbers[:, first : first + width] @ hessian[first : first + width, first:]
        lower[:, group:, group] = product.mul_(numbers[:, first:]).view(rows, groups - group, width).sum(2)
    own = lower.diagonal(dim1=1, dim2=2)
    own += damping * numbers.square_().view(rows, groups, width).sum(2)
    return lower, target


def _solve(lower: Tensor, target: Tensor, scales: Tensor) -> Tensor:
    """The solution held to the scales before, [rows, groups]; noise or NaN in a row whose matrix is not positive definite."""
    own = lower.diagonal(dim1=1, dim2=2)
    hold = (_HOLD * own).masked_fill_(own <= 0, 1.0)
    target += hold * scales
    own += hold
    factor = torch.linalg.cholesky_ex(lower)[0]
    return torch.cholesky_solve(target.unsqueeze(2), factor).squeeze(2)


@torch.no_grad()
def fitted_codes(
    weight: Tensor, lattice: Lattice, hessian: Tensor, factor: Factor, spec: QuantSpec, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """GPTQ's codes, scales fitted to them, GPTQ's codes for those, and scales fitted once more; rows that all this does not help keep the
    first codes and scales (all rows together where they share one scale). Zero points stay as they are.

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
    scales, zeros = lattice
    damping = factor.damping * float(hessian.diagonal().mean())
    first = gptq_codes(weight, scales, factor, spec, mask, zeros)
    between = fitted_scales(weight, first, scales, hessian, spec, damping, zeros)
    codes = gptq_codes(weight, between, factor, spec, mask, zeros)
    fitted = fitted_scales(weight, codes, between, hessian, spec, damping, zeros)
    before, after = (
        torch.cat([_errors(some, q, s, hessian, damping) for some, q, s in _pieces(weight, q, s, zeros)])
        for q, s in ((first, scales), (codes, fitted))
    )
    if len(scales) < len(weight):
        return (codes, fitted) if after.sum() < before.sum() else (first, scales)
    worse = after >= before
    codes[worse], fitted[worse] = first[worse], scales[worse]
    return codes, fitted


def _errors(weight: Tensor, numbers: Tensor, scales: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """fp64 [rows]: what each row's outputs are off by, squared; ``numbers`` are q - z."""
    off = weight - dequantize(numbers, scales)
    return row_energy(off, hessian) + damping * row_energy(off, None)
