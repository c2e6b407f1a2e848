"""Scales fitted to codes: of all scales, those with which these codes give the outputs nearest to the unrounded weight's.

For given codes the output error of a row is a quadratic function of its scales, and its least point is found by solving one equation in
as many unknowns as the row has groups:

    A s = b     A_gh = sum_{i in g, j in h} q_i H_ij q_j     b_g = sum_{i in g} q_i (H w)_i

Rounding again with these scales and fitting again lowers the error further: the two take turns as in Lloyd's algorithm (IEEE Trans. Inf.
Theory 28, 1982), with GPTQ as the rounding.
"""

import torch
from torch import Tensor

from ..fake_quant import dequantize
from ..fake_quant.reference import group_scales
from ..spec import QuantSpec
from .gptq import Factor, gptq_codes
from .report import row_energy

_HOLD = 0.01
"""Pull to the scales before, as a share of each group's own curvature: groups whose inputs are nearly alike share their error at random
otherwise, and calibration text is not all text."""
_PIECE = 2**21  # numbers of a matrix that is worked on at a time: 8 MB
_FARTHEST = 4.0  # a fitted scale that differs by more is no better description of its group but a sign of a near-singular equation


@torch.no_grad()
def fitted_scales(weight: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor, spec: QuantSpec, damping: float = 0.0) -> Tensor:
    """The scales nearest to the least squared output error for these codes.

    Args:
        weight: fp32 [out, in].
        codes: int8 [out, in].
        scales: fp32 [out, groups] that the codes were made with; a group keeps its own where all its codes are zero, or where the fitted
            one is not a positive number within a factor of 4 of it.
        hessian: fp32 [in, in], symmetric.
        spec: Of the grid.
        damping: Added to the Hessian's diagonal.

    Returns:
        fp32 [out, groups] on the spec's grid.
    """
    rows = _rows(weight, scales)
    parts = zip(weight.split(rows), codes.split(rows), scales.split(rows))
    solved = torch.cat([_least_squares(some, own_codes, own_scales, hessian, damping) for some, own_codes, own_scales in parts])
    usable = (solved > scales / _FARTHEST) & (solved < scales * _FARTHEST)
    grid = spec.grid
    return group_scales(torch.where(usable, solved, scales), 1.0, grid.dropped_bits, grid.smallest, grid.largest)


def _rows(weight: Tensor, scales: Tensor) -> int:
    """Rows worked on at a time."""
    return max(1, _PIECE // max(weight.shape[1], scales.shape[1] ** 2))


def _least_squares(weight: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """The equation's solution for some rows, fp32 [rows, groups]; noise or NaN in a row whose matrix is not positive definite."""
    rows, groups = scales.shape
    numbers = codes.to(torch.float32)
    width = weight.shape[1] // groups
    target = torch.addmm(weight, weight, hessian, beta=damping).mul_(numbers).view(rows, groups, width).sum(2)
    lower = torch.zeros(rows, groups, groups, device=weight.device)
    for group in range(groups):
        first = group * width
        product = numbers[:, first : first + width] @ hessian[first : first + width, first:]
        lower[:, group:, group] = product.mul_(numbers[:, first:]).view(rows, groups - group, width).sum(2)
    own = lower.diagonal(dim1=1, dim2=2)
    own += damping * numbers.square_().view(rows, groups, width).sum(2)
    hold = (_HOLD * own).masked_fill_(own <= 0, 1.0)
    target += hold * scales
    own += hold
    factor = torch.linalg.cholesky_ex(lower)[0]
    return torch.cholesky_solve(target.unsqueeze(2), factor).squeeze(2)


@torch.no_grad()
def fitted_codes(
    weight: Tensor, scales: Tensor, hessian: Tensor, factor: Factor, spec: QuantSpec, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """GPTQ's codes, scales fitted to them, GPTQ's codes for those, and scales fitted once more; rows that all this does not help keep the
    first codes and scales.

    Args:
        weight: fp32 [out, in], finite.
        scales: fp32 [out, groups] to begin with, on the spec's grid.
        hessian: fp32 [in, in] as given to ``factorize``.
        factor: Of that Hessian.
        spec: A symmetric integer lattice.
        mask: As in ``gptq_codes``.

    Returns:
        (codes int8 [out, in], scales fp32 [out, groups]).
    """
    damping = factor.damping * float(hessian.diagonal().mean())
    first = gptq_codes(weight, scales, factor, spec, mask)
    between = fitted_scales(weight, first, scales, hessian, spec, damping)
    codes = gptq_codes(weight, between, factor, spec, mask)
    fitted = fitted_scales(weight, codes, between, hessian, spec, damping)
    rows = _rows(weight, scales)
    for parts in zip(*(whole.split(rows) for whole in (weight, first, scales, codes, fitted))):
        piece, kept_codes, kept_scales, new_codes, new_scales = parts
        worse = _errors(piece, new_codes, new_scales, hessian, damping) >= _errors(piece, kept_codes, kept_scales, hessian, damping)
        new_codes[worse], new_scales[worse] = kept_codes[worse], kept_scales[worse]
    return codes, fitted


def _errors(weight: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """fp64 [rows]: what each row's outputs are off by, squared."""
    off = weight - dequantize(codes, scales)
    return row_energy(off, hessian) + damping * row_energy(off, None)
