"""Loss of a block of logits against sparse targets together with its gradient, in closed form and in place.

T times the gradient of the divergence (``losses.sparse``) with respect to the student's logits is

    on S        W q - w,                 W = sum of all weights, the tail's w_t included
    elsewhere   q (W - w_t / q_t)        (sampled form: W q)

and in the controlled form, with X = sum_S x:

    on S        (W - X) q - w + x
    elsewhere   (W - X) q
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sparse import SparseTargets, control
from .closed_form import BlockValues
from .inputs import Problem

BUFFERS = 2
"""Buffers [n, V] that a block needs in addition to its logits."""


def sparse_block(
    logits: Tensor, targets: SparseTargets, labels: Tensor, buffers: Sequence[Tensor], problem: Problem, *, gradient: bool
) -> tuple[BlockValues, Tensor | None]:
    """The loss of ``problem.settings`` against sparse targets, cross-entropy included.

    Args:
        logits: [n, V] final logits of the student; overwritten.
        targets: Targets of these n positions.
        labels: [n] int64.
        buffers: Two [n, V] for scratch.
        problem: Gives the settings.
        gradient: Whether to compute the gradient.

    Returns:
        (figures, gradient [n, V] with respect to ``logits`` or None). The figure ``kl`` is the divergence itself.
    """
    weight, temperature = problem.settings.hard_weight, targets.temperature
    first, second = buffers
    ids, weights = targets.filled()
    weights = weights.to(logits.dtype)
    # read before the softmaxes, which overwrite the logits
    best, own, known = logits.amax(-1), _at(logits, labels), logits.gather(1, ids).div_(temperature)
    matches = _at(logits, targets.best) >= best
    plain = torch.softmax(logits, -1, out=second)
    hard = _log_normaliser(best, plain) - own
    q = plain if temperature == 1 else torch.softmax(logits.div_(temperature), -1, out=first)
    known -= _log_normaliser(best / temperature, q).unsqueeze(1)
    value = targets.negative_entropy().to(q.dtype) - (weights * known).sum(1)
    # the gradient is ``others`` [n, 1] times q everywhere, plus ``slopes`` [n, K] at the known ids
    others = whole = weights.sum(1)
    slopes = -weights
    if targets.log_inclusion is not None:
        taken_off = control(known, weights, targets.log_inclusion.to(q.dtype))
        slopes, others = taken_off - weights, whole - taken_off.sum(1)
    if targets.log_tail is not None:
        tail = targets.log_tail.to(q.dtype).exp()
        if temperature == 1 and gradient and weight:
            # the lines below set entries of q to 0, and cross-entropy still needs all of them
            q = first.copy_(plain)
        # [n, K], read before these entries of q are set to 0
        own_q = torch.where(weights > 0, q.gather(1, ids), 0.0)
        # sum of the other tokens with the known ones set to 0: 1 minus a sum would be rounding noise
        mass = q.scatter_(1, ids, 0.0).sum(1).clamp(min=torch.finfo(q.dtype).tiny)
        value = value - torch.where(tail > 0, tail * mass.log(), 0.0)
        whole = whole + tail
        slopes, others = whole.unsqueeze(1) * own_q - weights, whole - tail / mass
    loss = value * problem.settings.scale if weight < 1 else torch.zeros_like(hard)
    figures = BlockValues(loss + weight * hard if weight else loss, hard, matches, value, targets.entropy.to(q.dtype))
    if not gradient:
        return figures, None
    factor = problem.settings.scale / temperature
    # in the buffer of the logits, which are not needed any more
    slope = torch.mul(q, (others * factor).unsqueeze(1), out=logits).scatter_add_(1, ids, slopes * factor)
    if weight:
        slope.add_(plain, alpha=weight)
        slope[torch.arange(len(slope), device=slope.device), labels] -= weight
    return figures, slope


def _log_normaliser(best: Tensor, q: Tensor) -> Tensor:
    """[n] from the largest logit and the probabilities: max q >= 1 / V cannot underflow, and a second exponential over V costs more."""
    return best - q.amax(-1).log()


def _at(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.gather(1, columns.unsqueeze(1)).squeeze(1)
