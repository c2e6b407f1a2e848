"""GPTQ: round the columns of a weight one after the other, each making good what rounding the ones before it has cost.

It lowers tr((W - Q) H (W - Q)^T), H = 2/N sum x x^T (Frantar et al., arXiv 2210.17323, algorithm 1). The paper takes the Cholesky
factor of the inverse of H. Its inverse in turn, R upper triangular with H = R R^T, gives the same codes without an inverse:

    column k is rounded as   v_k = w_k + sum_{i < k} (w_i - q_i) R_ik / R_kk

R is the Cholesky factor of H with rows and columns reversed. One factorization is all, the original weight stays untouched, errors are
plain differences to it, and what a block of columns has to make good is a matrix product (the paper's lazy updates).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import QuantSpec

BLOCK = 128
"""Columns between two large products."""
_INNER = 32  # columns between two small products inside a block


@dataclass(frozen=True)
class Factor:
    """What all weights with the same inputs share."""

    order: Tensor
    """int64 [in]: the columns in the order in which they are rounded."""
    links: Tensor
    """fp32 [in, in] in that order, lower triangle used: ``links[k, i]`` = R_ik / R_kk."""
    damping: float
    """Share of the mean diagonal that was added to the diagonal: what was asked for, or more when that was not enough."""
    pivots: Tensor
    """fp32 [in] in that order: R_kk^2, by which an error of column k counts that no later column makes good; 0 for an input that was
    always zero and is not damped."""


@dataclass(frozen=True)
class Pass:
    """What rounding all columns of a weight has left."""

    columns: Tensor
    """int8 [in, out]: the codes, a column after the other."""
    remains: Tensor
    """fp32 [in, out] in the factor's order: v_k - q_k, what of each column no earlier column has foreseen."""

    @property
    def codes(self) -> Tensor:
        """int8 [out, in]."""
        return self.columns.T.contiguous()

    def energy(self, factor: Factor) -> Tensor:
        """fp64 [out]: (w - q) H (w - q)^T of each row, H damped. With E = W - Q it is the squared length of a row of E R."""
        return factor.pivots.double() @ self.remains.double().square_()

    def pull(self, factor: Factor) -> Tensor:
        """fp32 [in, out]: H (W - Q)^T, H damped, columns where they belong; half the gradient of the energy. It is R (E R)^T."""
        weighted = self.remains * factor.pivots.unsqueeze(1)
        found = torch.empty_like(weighted)
        for start in range(0, len(weighted), BLOCK):
            stop = min(start + BLOCK, len(weighted))
            found[factor.order[start:stop]] = factor.links[start:, start:stop].T @ weighted[start:]
        return found


def damping_steps(damping: float) -> list[float]:
    """The dampings that are tried: the one asked for, then ten times as much each time (at least 0.001), up to 1."""
    steps = [damping]
    while (following := max(10 * steps[-1], 1e-3)) <= 1.0:
        steps.append(following)
    return steps


@torch.no_grad()
def factorize(hessian: Tensor, damping: float = 0.01, activation_order: bool = True) -> Factor | None:
    """Prepare a Hessian for ``gptq_codes``.

    Args:
        hessian: fp32 [in, in], finite; kept as it is. An input that was always zero has a zero row and column: its weights are rounded
            to nearest and correct nothing.
        damping: Share of the mean diagonal added to the diagonal; raised by ``damping_steps`` while the Cholesky factor does not exist.
        activation_order: Round the columns of the largest diagonal first (of equal ones the first); false: from left to right.

    Returns:
        None when no damping makes the matrix positive definite.
    """
    diagonal = hessian.diagonal()
    natural = torch.arange(len(diagonal), device=hessian.device)
    order = torch.sort(diagonal, descending=True, stable=True).indices if activation_order else natural
    last_first = order.flip(0)
    mean = diagonal.mean()
    for share in damping_steps(damping):
        matrix = hessian[last_first.unsqueeze(1), last_first]
        damped = matrix.diagonal().add_(share * mean)
        silent = damped == 0
        damped.masked_fill_(silent, 1.0)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        # a pivot that is all rounding error passes the factorization, but its ratios are noise without bound
        if not int(failed) and bool(torch.isfinite(lower).all()):
            links = lower.flip(0, 1).T.contiguous()
            pivots = links.diagonal().clone()
            links.div_(pivots.unsqueeze(1))
            return Factor(order=order, links=links, damping=share, pivots=pivots.square_().masked_fill_(silent.flip(0), 0.0))
    return None


@torch.no_grad()
def gptq_pass(
    weight: Tensor, scales: Tensor, factor: Factor, spec: QuantSpec, mask: Tensor | None = None, zeros: Tensor | None = None
) -> Pass:
    """Round a weight for given scales, on the lattice of ``fake_quant``: fp32 true division, half to even, clamped.

    Args:
        weight: [out, in], finite; weights with the same inputs may be stacked along out.
        scales: fp32 [out, groups], or [1, 1] for the whole matrix, on the spec's grid. Groups are those of the original columns, whatever
            the order: runtimes need no index.
        factor: From ``factorize``.
        spec: A lattice of kind int.
        mask: bool [out, in], True where a weight is kept. The others become 0 (the code of the zero point), and what that costs is made
            good by later columns.
        zeros: int8 zero points in the shape of ``scales``; None when the spec is symmetric.
    """
    columns = weight.shape[1]
    width = columns // scales.shape[1]
    target = weight.detach().to(torch.float32).T[factor.order]  # [in, out]: a column is contiguous
    kept = None if mask is None else mask.T[factor.order].to(torch.float32)
    errors, remains = torch.empty_like(target), torch.empty_like(target)
    codes = torch.empty(target.shape, dtype=torch.int8, device=weight.device)
    steps = _steps(scales, zeros, spec)
    groups = (factor.order // width).tolist()
    numbers = torch.empty_like(target[:BLOCK])
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block = torch.addmm(target[start:stop], factor.links[start:stop, :start], errors[:start], out=remains[start:stop])
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
            )
        found = numbers[: stop - start]
        if zeros is not None:
            found += zeros.T.to(torch.float32)[groups[start:stop]]
        codes[factor.order[start:stop]] = found.to(torch.int8)
    return Pass(codes, remains)


def gptq_codes(
    weight: Tensor, scales: Tensor, factor: Factor, spec: QuantSpec, mask: Tensor | None = None, zeros: Tensor | None = None
) -> Tensor:
    """The codes of ``gptq_pass``: int8 [out, in]."""
    return gptq_pass(weight, scales, factor, spec, mask, zeros).codes


_Step = tuple[Tensor, float | Tensor, float | Tensor]  # scale and limits of q - z for a column: [out] or [1], numbers without zero points


def _steps(scales: Tensor, zeros: Tensor | None, spec: QuantSpec) -> list[_Step]:
    """By group."""
    by_group = scales.T.contiguous().unbind()
    if zeros is None:
        return [(scale, spec.qmin, spec.qmax) for scale in by_group]
    shifts = zeros.T.to(torch.float32)
    return [(scale, spec.qmin - shift, spec.qmax - shift) for scale, shift in zip(by_group, shifts)]


class _Columns(NamedTuple):
    """Some columns [columns, out], one after the other."""

    target: Tensor
    """The weights."""
    values: Tensor
    """What is rounded, with what the columns before these have to make good; becomes what rounding leaves of it."""
    numbers: Tensor
    """Becomes q - z."""
    errors: Tensor
    """Becomes weights less what they are rounded to."""


def _round_columns(columns: _Columns, kept: Tensor | None, links: Tensor, steps: list[_Step]) -> None:
    parts = zip(*(tensor.unbind() for tensor in columns), steps)
    for index, (target, value, number, error, (scale, low, high)) in enumerate(parts):
        if index:
            value.addmv_(columns.errors[:index].T, links[index, :index])
        torch.div(value, scale, out=number)
        number.round_().clamp_(low, high)  # pyright: ignore[reportArgumentType, reportCallIssue]
        if kept is not None:
            number.mul_(kept[index])
        torch.addcmul(target, number, scale, value=-1, out=error)
        value.addcmul_(number, scale, value=-1)
