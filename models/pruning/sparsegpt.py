"""SparseGPT: weights are pruned column by column, and the columns that follow make up for the error in the outputs.

A weight is pruned where that costs least: w^2 / [U_jj]^2 is smallest, U the upper Cholesky factor of the inverse of H. With H = R R^T
(``models.calibration.factor``) U is the inverse of R, so the cost is w^2 R_jj^2 and H is never inverted. Which weights stay is decided for
128 columns at a time, or with a pattern for one group at a time, on weights that already make up for all columns before.

Source: Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot" (arXiv 2301.00774), algorithm 1.
"""

import torch
from torch import Tensor

from ..calibration.factor import Factor
from .pattern import Pattern
from .selection import exact_count, finite, largest, pattern_mask

BLOCK = 128
"""Columns whose masks are chosen together without a pattern, as in the paper."""
_INNER = 32  # columns per part of a block: one product with the errors of the parts before it


@torch.no_grad()
def sparsegpt(
    name: str,
    weight: Tensor,
    hessian: Tensor,
    factor: Factor,
    keep: float,
    pattern: Pattern | None = None,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Prunes one linear.

    Args:
        name: Name of the weight, for messages.
        weight: [out, in]; not changed.
        hessian: fp32 [in, in], 2/N sum x x^T. Weights of inputs that were always zero become zero.
        factor: ``factorize(hessian, damping, activation_order=False)``.
        keep: Share of the matrix that stays: exactly ``round(keep * out * in)`` weights, spread evenly over the blocks.
        pattern: N:M in place of ``keep``.
        allowed: bool [out, in]; other weights are zero already and stay so.

    Returns:
        (fp32 [out, in] with zeros, bool [out, in] mask, True = kept).

    Raises:
        NonFiniteError: weights before or after are NaN or infinite.
    """
    columns = weight.shape[1]
    # columns first, because they are worked on one by one
    target = finite(name, weight.detach().to(torch.float32)).T.clone(memory_format=torch.contiguous_format)  # [in, out]
    target[hessian.diagonal() == 0] = 0
    free = None if allowed is None else allowed.T
    pruned, errors = torch.empty_like(target), torch.empty_like(target)
    mask = torch.empty(target.shape, dtype=torch.bool, device=target.device)
    links, inner = factor.links, pattern.group if pattern else _INNER
    # whole groups in every block
    size = BLOCK // inner * inner
    chosen = 0
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        # with the compensation for all blocks before it: [block, start] @ [start, out]
        block = torch.addmm(target[start:stop], links[start:stop, :start], errors[:start])
        if pattern is None:
            # what is due by the end of this block, so that the whole is exact
            due = exact_count(keep, stop * weight.shape[0]) - chosen
            costs = _costs(target[start:stop], block, factor, slice(start, stop))
            mask[start:stop] = largest(costs, due, None if free is None else free[start:stop].T).T
            chosen += int(mask[start:stop].sum())
        for first in range(start, stop, inner):
            end = min(first + inner, stop)
            part = block[first - start : end - start]
            part.addmm_(links[first:end, start:first], errors[start:first])
            if pattern is not None:
                costs = _costs(target[first:end], part, factor, slice(first, end))
                mask[first:end] = pattern_mask(costs, pattern, None if free is None else free[first:end].T).T
            for index in range(first, end):
                value = part[index - first]
                if index > first:
                    value.addmv_(errors[first:index].T, links[index, first:index])
                torch.mul(value, mask[index], out=pruned[index])
                # the whole difference to the original weight is what later columns make up for
                torch.sub(target[index], pruned[index], out=errors[index])
    return finite(name, pruned.T.contiguous()), mask.T.contiguous()


def _costs(target: Tensor, values: Tensor, factor: Factor, columns: slice) -> Tensor:
    """What the outputs lose with each weight of some columns: fp32 [out, columns].

    Args:
        target: [columns, out], the original weights.
        values: [columns, out], with the compensation for all columns before the first of these.
        factor: The factor.
        columns: Their place.
    """
    # ``values`` of a column are what it should be once the columns before it are final. Until then these move too, each to its own best
    # value, and that counts as a change of theirs: d_k + sum_{first <= i < k} d_i R_ik / R_kk = values_k - target_k
    links = factor.links[columns, columns]
    moved = torch.linalg.solve_triangular(links, values - target, upper=False, unitriangular=True)
    return ((target + moved).square_() * factor.pivots[columns].unsqueeze(1)).T
