"""Loss of a block of logits against sparse targets together with its gradient, in closed form and in place.

T times the gradient of the divergence (``losses.sparse``) with respect to the student's logits is

    on S        W q - w,                 W = sum of all weights, that of the tail included
    elsewhere   q (W - w_t / q_t)        (sampled form: W q)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sparse import SparseTargets
from .closed_form import BlockValues
from .inputs import Problem

BUFFERS = 2
"""Buffers [n, V] that a block needs beside its logits."""


def sparse_block(
    logits: Tensor, targets: SparseTargets, labels: Tensor, buffers: Sequence[Tensor], problem: Problem, *, gradient: bool
) -> tuple[BlockValues, Tensor | None]:
    """The mixed loss of ``problem.settings`` against sparse targets.

    Args:
        logits: [n, V] final logits of the student; overwritten.
        targets: Of these n positions.
        labels: [n] int64.
        buffers: Two [n, V] for scratch.
        problem: For its settings.
        gradient: Whether the gradient is wanted.

    Returns:
        (figures, gradient [n, V] with respect to ``logits`` or None). The figure ``kl`` is the divergence itself.
    """
    weight, temperature = problem.settings.hard_weight, targets.temperature
    matches = _at(logits, targets.best) >= logits.amax(-1)
    hard = logits.logsumexp(-1) - _at(logits, labels)
    first, second = buffers
    plain = torch.softmax(logits, -1, out=second).clone() if gradient and weight and temperature != 1 else None
    log_q = torch.log_softmax(logits.div_(temperature) if temperature != 1 else logits, -1, out=first)
    ids, weights = targets.filled()
    weights = weights.to(log_q.dtype)
    value = targets.negative_entropy().to(log_q.dtype) - (weights * log_q.gather(1, ids)).sum(1)
    q, whole, ratio = log_q.exp_(), weights.sum(1), None
    if targets.log_tail is not None:
        tail = targets.log_tail.to(q.dtype).exp()
        other = second.copy_(q).scatter_(1, ids, 0.0)
        mass = other.sum(1).clamp(min=torch.finfo(q.dtype).tiny)
        value = value - torch.where(tail > 0, tail * mass.log(), 0.0)
        whole, ratio = whole + tail, tail / mass
    loss = value * problem.settings.scale if weight < 1 else torch.zeros_like(hard)
    figures = BlockValues(loss + weight * hard if weight else loss, hard, matches, value, targets.entropy.to(q.dtype))
    if not gradient:
        return figures, None
    if plain is None:
        plain = q
    slope = logits.copy_(q).mul_(whole.unsqueeze(1))
    if ratio is not None:
        slope.sub_(second.mul_(ratio.unsqueeze(1)))
    slope.scatter_add_(1, ids, -weights).mul_(problem.settings.scale / temperature)
    if weight:
        slope.add_(plain, alpha=weight)
        slope[torch.arange(len(slope), device=slope.device), labels] -= weight
    return figures, slope


def _at(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.gather(1, columns.unsqueeze(1)).squeeze(1)
