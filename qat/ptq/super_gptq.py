"""GPTQ on super-blocks: columns rounded one after the other with sub-scales found beforehand, then the fp16 numbers fitted to the codes.

Column k is rounded as v_k of ``gptq.py``, with S and M of its sub-block (``fake_quant/super_reference.py``). For the codes that come out
the output error of a row is a quadratic function of its d and dmin, as in ``scale_fit.py``: values are B z, z = all d and dmin of the row,
B from codes, sub-scales and sub-minimums. The minimum is z + e with (B^T H B) e = B^T H (w - y). The new numbers are rounded to fp16, and
rows that they do not improve keep the old ones.

Source: Frantar et al., arXiv 2210.17323, algorithm 1.
"""

import torch
from torch import Tensor

from ...models.calibration.factor import Factor
from ..fake_quant.super_reference import LARGEST, SMALLEST, kept_weights, steps
from ..ptq_limits import TWICE_TO
from ..super_blocks import SUPER_BLOCKS, WIDTH
from .gptq import Pass
from .super_search import SuperScales

_BLOCK = 64  # columns per product with the errors of all columns before them
_HOLD = 0.01  # ridge, as in ``scale_fit.py``
_PIECE = 2**22  # numbers of a matrix per piece of work


@torch.no_grad()
def super_gptq_pass(weight: Tensor, found: SuperScales, factor: Factor, kind: str, mask: Tensor | None = None) -> Pass:
    """Round all columns of a weight [out, in] with given scales; arguments and result as in ``gptq.gptq_pass``."""
    form = SUPER_BLOCKS[kind]
    low, high = form.codes
    # [in, out], in the order of rounding: a column is contiguous
    target = weight.detach().to(torch.float32).T[factor.order]
    kept = None if mask is None else mask.T[factor.order].to(torch.float32)
    step, under = (None if part is None else part.T.contiguous() for part in steps(*found))
    assert step is not None
    groups = (factor.order // form.width).tolist()
    errors, remains, numbers = torch.empty_like(target), torch.empty_like(target), torch.empty_like(target)
    for start in range(0, len(target), _BLOCK):
        stop = min(start + _BLOCK, len(target))
        # v of these columns with the compensation for all before them
        torch.addmm(target[start:stop], factor.links[start:stop, :start], errors[:start], out=remains[start:stop])
        for k in range(start, stop):
            value, scale = remains[k], step[groups[k]]
            if k > start:
                value.addmv_(errors[start:k].T, factor.links[k, start:k])
            offset = None if under is None else under[groups[k]]
            code = ((value if offset is None else value + offset) / scale).round_().clamp_(low, high)
            if kept is not None:
                code.mul_(kept[k])
            given = code * scale if offset is None else code * scale - offset
            numbers[k] = code
            torch.sub(target[k], given, out=errors[k])
            value.sub_(given)
    codes = torch.empty(target.shape, dtype=torch.int8, device=weight.device)
    codes[factor.order] = numbers.to(torch.int8)
    return Pass(codes, remains)


@torch.no_grad()
def fitted_super(
    columns: Tensor, found: SuperScales, pull: Tensor, hessian: Tensor, kind: str, damping: float = 0.0
) -> tuple[SuperScales, Tensor]:
    """Fit d and dmin to given codes by least squares over the outputs.

    Args:
        columns: int8 [in, out]: the codes.
        found: The scales with which they were made.
        pull: fp32 [in, out]: H (W - Y)^T for them, H damped.
        hessian: fp32 [in, in], not damped.
        kind: q2_k to q6_k.
        damping: Added to the Hessian's diagonal.

    Returns:
        (scales, gain): gain fp64 [out], by how much they lower each row's damped squared error.
    """
    rows = max(1, _PIECE // max(1, columns.shape[0] * 4))
    fitted, gains = [], []
    for first in range(0, columns.shape[1], rows):
        piece = slice(first, first + rows)
        own = SuperScales(found.scales[piece], found.sub.rows(piece))
        new, gain = _fit(columns[:, piece], own, pull[:, piece], hessian, kind, damping)
        fitted.append(new)
        gains.append(gain)
    numbers = [torch.cat([one[part] for one in fitted]) for part in range(len(fitted[0]))]
    sub = found.sub if found.sub.minimum is None else found.sub._replace(minimum=numbers[1])
    return SuperScales(numbers[0], sub), torch.cat(gains)


def _fit(
    columns: Tensor, found: SuperScales, pull: Tensor, hessian: Tensor, kind: str, damping: float
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    basis, before = _basis(columns, found, kind)
    blocks, outputs = found.scales.shape[1], columns.shape[1]
    count = len(basis) * blocks
    # [kinds of numbers x super-blocks] unknowns per row
    matrix = torch.zeros(outputs, count, count, device=pull.device)
    target = torch.cat([_by_block(one * pull) for one in basis]).T
    for kind_of, one in enumerate(basis):
        for block in range(blocks):
            inside = slice(block * WIDTH, (block + 1) * WIDTH)
            # H B for one unknown of every row: [in, 256] @ [256, rows]
            product = hessian[:, inside] @ one[inside]
            product[inside].add_(one[inside], alpha=damping)
            matrix[:, :, kind_of * blocks + block] = torch.cat([_by_block(other * product) for other in basis]).T
    own = matrix.diagonal(dim1=1, dim2=2)
    curvature = own.clone()
    held = matrix.clone()
    # an unknown without curvature (no code but 0, no minimum) keeps its number: a 1 keeps the system solvable
    held.diagonal(dim1=1, dim2=2).add_((_HOLD * curvature).masked_fill_(curvature <= 0, 1.0))
    moved = torch.cholesky_solve(target.unsqueeze(2), torch.linalg.cholesky_ex(held)[0]).squeeze(2)
    now = torch.cat(before, 1)
    wanted = now + moved
    # d stays positive, dmin may become 0; a change beyond a factor of 4 comes from a nearly singular system
    usable = torch.isfinite(wanted) & (wanted < 4 * now) & (wanted > now / 4)
    new = torch.where(usable, wanted, now).clamp(max=LARGEST).to(torch.float16).to(torch.float32)
    new[:, :blocks].clamp_(min=SMALLEST)
    change = (new - now).double()
    # of the numbers as they are stored, after fp16 and without the ridge
    gain = (change * (2 * target.double() - (matrix.double() @ change.unsqueeze(2)).squeeze(2))).sum(1)
    helped = gain > 0
    new = torch.where(helped.unsqueeze(1), new, now)
    return list(new.split(blocks, 1)), torch.where(helped, gain, 0.0)


def _basis(columns: Tensor, found: SuperScales, kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """(what d, and dmin, of a weight are multiplied with, each fp32 [in, rows]; the numbers now, each [rows, super-blocks])."""
    width, sub = SUPER_BLOCKS[kind].width, found.sub
    basis, now = [columns * sub.scales.T.to(torch.float32).repeat_interleave(width, 0)], [found.scales]
    if sub.minimum is not None and sub.minimums is not None:
        basis.append(-sub.minimums.T.to(torch.float32).repeat_interleave(width, 0))
        now.append(sub.minimum)
    return basis, now


def _by_block(values: Tensor) -> Tensor:
    """[in, rows] summed over each super-block: [super-blocks, rows]."""
    return values.view(-1, WIDTH, values.shape[1]).sum(1)


@torch.no_grad()
def fitted_super_codes(
    weight: Tensor, found: SuperScales, hessian: Tensor, factor: Factor, kind: str, mask: Tensor | None = None
) -> tuple[Tensor, SuperScales]:
    """Round by GPTQ and fit d and dmin to the codes; below 4 bits, and for pruned weights, a second time, kept row by row where it helps.

    Returns:
        (codes int8 [out, in], scales).
    """
    codes, scales, error = _turn(weight, found, hessian, factor, kind, mask)
    if SUPER_BLOCKS[kind].bits > TWICE_TO and mask is None:
        return codes, scales
    again, fitted, left = _turn(weight, scales, hessian, factor, kind, mask)
    worse = (left >= error).unsqueeze(1)
    minimum = fitted.sub.minimum
    if minimum is not None and scales.sub.minimum is not None:
        minimum = torch.where(worse, scales.sub.minimum, minimum)
    kept = SuperScales(torch.where(worse, scales.scales, fitted.scales), fitted.sub._replace(minimum=minimum))
    return torch.where(worse, codes, again), kept


def _turn(
    weight: Tensor, found: SuperScales, hessian: Tensor, factor: Factor, kind: str, mask: Tensor | None
) -> tuple[Tensor, SuperScales, Tensor]:  # fmt: skip
    """(codes, fitted scales, damped squared error of each row with them, fp64)."""
    done = super_gptq_pass(kept_weights(weight, None), found, factor, kind, mask)
    damping = factor.damping * float(hessian.diagonal().mean())
    fitted, gain = fitted_super(done.columns, found, done.pull(factor), hessian, kind, damping)
    return done.codes, fitted, done.energy(factor) - gain
