"""Loss of a block of logits together with its gradient, in closed form and in place; autograd would hold several copies of the block.

``slopes.py`` has the derivatives of the divergences; cross-entropy adds softmax(z_s) - onehot.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..logits import FLOOR
from ..own import own_block
from ..settings_own import OwnLossSettings
from .inputs import Problem
from .slopes import Pair, infinite, soft


@dataclass(frozen=True, eq=False)
class BlockValues:
    """Per-token figures [n] of a block; see ``LossSums`` for their meaning."""

    loss: Tensor
    cross_entropy: Tensor
    top1_matches: Tensor
    kl: Tensor | None = None
    teacher_entropy: Tensor | None = None


def cross_entropy_block(logits: Tensor, labels: Tensor, buffer: Tensor, *, gradient: bool) -> tuple[BlockValues, Tensor | None]:
    """Cross-entropy without a teacher.

    Args:
        logits: [n, V] final logits of the student.
        labels: [n] int64.
        buffer: [n, V] scratch.
        gradient: Whether to compute the gradient.

    Returns:
        (figures, gradient [n, V] with respect to ``logits`` or None); the gradient is in ``buffer``.
    """
    own, best = _at(logits, labels), logits.amax(-1)
    q = torch.softmax(logits, -1, out=buffer)
    # log-normaliser = best - log(max q), where max q >= 1 / V cannot underflow: cheaper than a second exponential over V
    hard = (best - own) - q.amax(-1).log()
    return BlockValues(hard, hard, own >= best), _minus_onehot(q, labels, 1.0) if gradient else None


def divergence_block(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, buffers: Sequence[Tensor], problem: Problem, *, gradient: bool
) -> tuple[BlockValues, Tensor | None]:
    """The loss of ``problem.settings`` against a teacher's logits, cross-entropy included.

    Args:
        logits: [n, V] final logits of the student; overwritten.
        teacher_logits: [n, V] final logits of the teacher; overwritten.
        labels: [n] int64.
        buffers: Three [n, V] for scratch.
        problem: Gives the settings, and whether a logit may be -inf.
        gradient: Whether to compute the gradient.

    Returns:
        (figures, gradient [n, V] with respect to ``logits`` or None); the gradient is in one of the buffers or the logits.
    """
    settings = problem.settings
    weight, temperature = settings.hard_weight, settings.temperature or 1.0
    # the figures at temperature 1 come first: what follows overwrites the logits
    matches = _at(logits, teacher_logits.argmax(-1)) >= logits.amax(-1)
    pair, entropy = _plain_pair(logits, teacher_logits, buffers, problem.impossible)
    # [n] each; vecdot sums over V without a further [n, V] buffer for the product
    hard, kl = -_at(pair.log_q, labels), torch.linalg.vecdot(pair.p, pair.d)
    infinite_rows = None
    if problem.impossible:
        # log 0 is the finite FLOOR in the buffers, so that 0 * log 0 is 0: sums that must be inf are corrected afterwards
        hard = torch.where(hard >= -FLOOR / 2, torch.inf, hard)
        kl = kl.masked_fill(infinite(pair.d, "forward_kl"), torch.inf)
        infinite_rows = infinite(pair.d, settings.divergence)
    if weight == 1:
        figures = BlockValues(hard, hard, matches, kl, entropy)
        return figures, _minus_onehot(pair.log_q.exp_(), labels, 1.0) if gradient else None
    # log q at temperature 1, which the gradient of cross-entropy needs below
    student = pair.log_q
    if isinstance(settings, OwnLossSettings):
        if gradient and weight:
            student = student.exp_()
        value, slope = own_block(logits, teacher_logits, settings, gradient=gradient)
    elif temperature == 1:
        value, slope = soft(pair, logits, settings, gradient=gradient)
    else:
        if gradient and weight:
            student.exp_()
        # p and d at temperature 1 are summed up already, so their buffers are free; q is still needed for the gradient of cross-entropy
        spare = teacher_logits
        pair = _tempered_pair(logits, teacher_logits, temperature, (pair.p, pair.d), problem.impossible)
        value, slope = soft(pair, spare, settings, gradient=gradient)
    if infinite_rows is not None:
        value = value.masked_fill(infinite_rows, torch.inf)
    loss = value * settings.scale
    # a term of weight 0 is left out: 0 times an infinite cross-entropy would be NaN
    if weight:
        loss += weight * hard
    if slope is not None:
        # ``soft`` gives T times the gradient
        slope = _scaled(slope, settings.scale / temperature)
        if weight:
            slope = _minus_onehot(slope.add_(student, alpha=weight), labels, weight)
    return BlockValues(loss, hard, matches, kl, entropy), slope


def _plain_pair(logits: Tensor, teacher_logits: Tensor, buffers: Sequence[Tensor], impossible: bool) -> tuple[Pair, Tensor]:
    """The two distributions at temperature 1, and the teacher's entropy [n]; leaves both logits unchanged."""
    # buffers: log q, log p and then d, p
    log_q = _log_softmax(logits, buffers[0], impossible)
    d = _log_softmax(teacher_logits, buffers[1], impossible)
    p = torch.exp(d, out=buffers[2])
    entropy = -torch.linalg.vecdot(p, d)
    return Pair(p, log_q, d.sub_(log_q)), entropy


def _tempered_pair(logits: Tensor, teacher_logits: Tensor, temperature: float, buffers: tuple[Tensor, Tensor], impossible: bool) -> Pair:
    """The two distributions at ``temperature``; overwrites both logits."""
    log_q = _log_softmax(logits.div_(temperature), buffers[0], impossible)
    d = _log_softmax(teacher_logits.div_(temperature), buffers[1], impossible)
    # the student's logits are in log_q by now, so their buffer is free
    p = torch.exp(d, out=logits)
    return Pair(p, log_q, d.sub_(log_q))


def _log_softmax(logits: Tensor, out: Tensor, impossible: bool) -> Tensor:
    """Log-probabilities in ``out``; at least ``FLOOR`` if some may be log 0."""
    logs = torch.log_softmax(logits, -1, out=out)
    return logs.clamp_(min=FLOOR) if impossible else logs


def _at(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.gather(1, columns.unsqueeze(1)).squeeze(1)


def _minus_onehot(rows: Tensor, labels: Tensor, weight: float) -> Tensor:
    each = torch.arange(len(rows), device=rows.device)
    rows[each, labels] -= weight
    return rows


def _scaled(rows: Tensor, factor: float) -> Tensor:
    """``rows`` times ``factor``, in place. A factor of 1 is skipped: a pass over [n, V] takes a third of a softmax's time."""
    return rows if factor == 1 else rows.mul_(factor)
