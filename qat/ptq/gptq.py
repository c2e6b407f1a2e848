"""GPTQ rounds the columns of a weight one after the other; each column compensates for the rounding errors of the columns before it.

It lowers tr((W - Q) H (W - Q)^T), H = 2/N sum x x^T (Frantar et al., arXiv 2210.17323, algorithm 1). The paper takes the Cholesky
factor of the inverse of H. The inverse of that factor, R upper triangular with H = R R^T, gives the same codes without inverting H:

    column k is rounded as   v_k = w_k + sum_{i < k} (w_i - q_i) R_ik / R_kk

R is the Cholesky factor of H with rows and columns reversed. So one factorization is enough, the original weight is not changed, errors
are plain differences to it, and the compensation of a block of columns is one matrix product (the paper's lazy updates).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...models.calibration.factor import Factor
from ..fake_quant.float_reference import LIMITS, nearest_value
from ..fake_quant.floats import codes_of
from ..spec import QuantSpec

BLOCK = 128
"""Columns per block: one product with the errors of all blocks before it."""
_INNER = 32  # columns per part of a block: one product with the errors of the parts before it


@dataclass(frozen=True)
class Pass:
    """Result of rounding all columns of a weight."""

    columns: Tensor
    """[in, out]: the codes, column by column; int8, or as ``fake_quant.Encoded`` has those of floats."""
    remains: Tensor
    """fp32 [in, out] in the factor's order: v_k - q_k, the rounding error of each column after compensation for the columns before it."""

    @property
    def codes(self) -> Tensor:
        """The codes [out, in]."""
        return self.columns.T.contiguous()

    def energy(self, factor: Factor) -> Tensor:
        """fp64 [out]: (w - q) H (w - q)^T per row, H damped. With E = W - Q it is the squared length of a row of E R."""
        return factor.pivots.double() @ self.remains.double().square_()

    def pull(self, factor: Factor) -> Tensor:
        """fp32 [in, out]: H (W - Q)^T = R (E R)^T, H damped, in the original order of columns; half the gradient of the energy."""
        # R_kk^2 (v_k - q_k): with ``links``, whose rows are divided by R_kk, the product is R (E R)^T
        weighted = self.remains * factor.pivots.unsqueeze(1)
        found = torch.empty_like(weighted)
        for start in range(0, len(weighted), BLOCK):
            stop = min(start + BLOCK, len(weighted))
            # R is upper triangular: these rows need only the columns from ``start`` on. [block, in - start] @ [in - start, out]
            found[factor.order[start:stop]] = factor.links[start:, start:stop].T @ weighted[start:]
        return found


@torch.no_grad()
def gptq_pass(
    weight: Tensor, scales: Tensor, factor: Factor, spec: QuantSpec, mask: Tensor | None = None, zeros: Tensor | None = None
) -> Pass:
    """Rounds a weight with given scales by the arithmetic of ``fake_quant``: fp32 true division, half to even (floats: to the nearest
    number of the code book), clamped.

    Args:
        weight: [out, in], finite; weights with the same inputs may be stacked along out.
        scales: fp32 [out, groups], or [1, 1] for the whole matrix, on the spec's grid of scales (nvfp4: after division by the global one).
            A group is a range of original columns in every order of rounding, so runtimes need no group index.
        factor: From ``factorize``.
        spec: A quantization spec.
        mask: bool [out, in], True where a weight is kept. The others become 0 (the code of the zero point), and later columns compensate
            for that.
        zeros: int8 zero points in the shape of ``scales``; None when the spec is symmetric.
    """
    columns = weight.shape[1]
    width = columns // scales.shape[1]
    # 1. everything in the order of rounding, columns first
    target = weight.detach().to(torch.float32).T[factor.order]  # [in, out]: a column is contiguous
    kept = None if mask is None else mask.T[factor.order].to(torch.float32)
    errors, remains = torch.empty_like(target), torch.empty_like(target)
    # bytes of either kind of code: float8 cannot be put into rows by index
    codes = torch.empty(target.shape, dtype=torch.uint8, device=weight.device)
    dtype = torch.int8
    steps = _steps(scales, zeros, spec)
    groups = (factor.order // width).tolist()
    numbers = torch.empty_like(target[:BLOCK])
    # column by column all corrections would be matrix-vector products; in two levels of blocks most of them are matrix products
    # 2. rounding, block by block
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        # v of this block with the compensation for all blocks before it: [block, start] @ [start, out]
        block = torch.addmm(target[start:stop], factor.links[start:stop, :start], errors[:start], out=remains[start:stop])
        # ``errors`` holds w - q of all columns so far; each part adds those of its own block
        for first in range(start, stop, _INNER):
            end = min(first + _INNER, stop)
            inner = slice(first - start, end - start)
            block[inner].addmm_(factor.links[first:end, start:first], errors[start:first])
            columns_here = _Columns(target[first:end], block[inner], numbers[inner], errors[first:end])
            _round_columns(
                columns_here,
                None if kept is None else kept[first:end],
                factor.links[first:end, first:end],
                [steps[g] for g in groups[first:end]],
                spec.kind,
            )
        found = numbers[: stop - start]
        # until here numbers are q - z, so that a pruned weight is 0 with and without zero points
        if zeros is not None:
            found += zeros.T.to(torch.float32)[groups[start:stop]]
        own = found.to(torch.int8) if spec.kind == "int" else codes_of(found, spec.kind)
        codes[factor.order[start:stop]], dtype = own.view(torch.uint8), own.dtype
    return Pass(codes.view(dtype), remains)


def gptq_codes(
    weight: Tensor, scales: Tensor, factor: Factor, spec: QuantSpec, mask: Tensor | None = None, zeros: Tensor | None = None
) -> Tensor:
    """The codes of ``gptq_pass``: [out, in]."""
    return gptq_pass(weight, scales, factor, spec, mask, zeros).codes


_Step = tuple[Tensor, float | Tensor, float | Tensor]  # of a column: its scale [out] or [1], and the limits of q - z, floats if z = 0


def _steps(scales: Tensor, zeros: Tensor | None, spec: QuantSpec) -> list[_Step]:
    """One entry per group."""
    by_group = scales.T.contiguous().unbind()
    if spec.kind != "int":
        return [(scale, -LIMITS[spec.kind], LIMITS[spec.kind]) for scale in by_group]
    if zeros is None:
        return [(scale, spec.qmin, spec.qmax) for scale in by_group]
    shifts = zeros.T.to(torch.float32)
    return [(scale, spec.qmin - shift, spec.qmax - shift) for scale, shift in zip(by_group, shifts)]


class _Columns(NamedTuple):
    """Some adjacent columns, each tensor [columns, out]."""

    target: Tensor
    """The weights."""
    values: Tensor
    """The weights plus the compensation for columns before these; overwritten with v - q."""
    numbers: Tensor
    """Output: q - z."""
    errors: Tensor
    """Output: weights minus rounded weights."""


def _round_columns(columns: _Columns, kept: Tensor | None, links: Tensor, steps: list[_Step], kind: str) -> None:
    """Rounds the columns one by one; ``kept`` [columns, out] is 0 for pruned weights, ``links`` is [columns, columns]."""
    parts = zip(*(tensor.unbind() for tensor in columns), steps)
    for index, (target, value, number, error, (scale, low, high)) in enumerate(parts):
        # compensation for the columns of this part that are already rounded
        if index:
            value.addmv_(columns.errors[:index].T, links[index, :index])
        torch.div(value, scale, out=number)
        if kind == "int":
            number.round_().clamp_(low, high)  # pyright: ignore[reportArgumentType, reportCallIssue]
        else:
            number.copy_(nearest_value(number.clamp_(low, high), kind))  # pyright: ignore[reportArgumentType, reportCallIssue]
        if kept is not None:
            number.mul_(kept[index])
        # the error to the original weight is what later columns compensate
        torch.addcmul(target, number, scale, value=-1, out=error)
        value.addcmul_(number, scale, value=-1)
