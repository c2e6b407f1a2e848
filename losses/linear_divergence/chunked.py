"""linear_divergence without [N, V] logits: each block of rows goes from hidden states to loss and gradient before the next one starts.

It holds a few [rows, V] buffers within a fixed budget, fp32 gradients of hidden states and head, and fp32 copies of bf16 or fp16 heads.
Masked rows cost nothing, and no gradient is computed for a frozen head or frozen hidden states.
"""

from functools import partial

import torch
from torch import Tensor

from ..block_rows import (
    ACCELERATOR_LIMITS,
    BUFFERS_ALONE,
    BUFFERS_OF_AUTOGRAD,
    BUFFERS_WITH_TEACHER,
    CPU_LIMITS,
    rows_per_block,
)
from ..block_rows import BlockLimits as BlockLimits
from ..settings_own import OwnLossSettings
from ..sparse import SparseTargets
from ..sums import LossSums
from .closed_form import BlockValues, cross_entropy_block, divergence_block
from .gradients import Gradients, sums_with_gradients
from .inputs import HiddenStates, LogitTransform, Problem, TeacherLogits
from .sparse_form import BUFFERS as SPARSE_BUFFERS
from .sparse_form import sparse_block


def chunked_sums(problem: Problem, *, rows: int | None = None) -> LossSums:
    """Computes the sums of ``problem``; ``loss`` has gradients for the student's hidden states, head and bias.

    Args:
        problem: The checked inputs.
        rows: Rows per block; None = as many as the memory budget of the device allows.
    """
    return sums_with_gradients(problem, partial(_run, rows=rows))


class _Product:
    """Computes the final logits of a model block by block into a buffer; converts the head to the problem's dtype once."""

    def __init__(self, states: HiddenStates, problem: Problem) -> None:
        v_eff, self.dtype = problem.v_eff, problem.dtype
        self.states = states
        # hidden states are converted block by block instead: all of them in fp32 would be a second copy of [N, H]
        self.head = states.head.detach()[:v_eff].to(self.dtype)
        self.bias = None if states.bias is None else states.bias.detach()[:v_eff].to(self.dtype)

    def hidden(self, block: Tensor | slice) -> Tensor:
        """Rows [n, H] of a block in the problem's dtype."""
        return self.states.hidden.detach()[block].to(self.dtype)

    def into(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Final logits [n, V] of ``hidden`` in ``out``."""
        if self.bias is None:
            torch.mm(hidden, self.head.T, out=out)
        else:
            torch.addmm(self.bias, hidden, self.head.T, out=out)
        transform = self.states.transform
        if transform is None:
            return out
        if transform.softcap is None:
            return out if transform.logit_scale == 1 else out.mul_(transform.logit_scale)
        return out.mul_(transform.logit_scale / transform.softcap).tanh_().mul_(transform.softcap)


def _run(problem: Problem, gradients: Gradients, rows: int | None) -> tuple[Tensor, ...]:
    """Loss, cross-entropy, KL, teacher entropy and top-1 matches, summed; fills ``gradients``."""
    labels, v_eff, dtype, teacher = problem.labels, problem.v_eff, problem.dtype, problem.teacher
    count = len(problem.kept)
    student = _Product(problem.student, problem)
    taught = _Product(teacher, problem) if isinstance(teacher, HiddenStates) else teacher
    buffers = _buffers(teacher)
    # what autograd holds in addition counts for the size of a block, and is allocated by itself
    held = BUFFERS_OF_AUTOGRAD if taught is not None and isinstance(problem.settings, OwnLossSettings) else 0
    # the derivative of a soft cap needs one more buffer, and only where there is a gradient
    capped = gradients.any and problem.student.transform is not None and problem.student.transform.softcap is not None
    if rows is None:
        limits = CPU_LIMITS if labels.device.type == "cpu" else ACCELERATOR_LIMITS
        rows = rows_per_block(count, v_eff, buffers + capped + held, dtype.itemsize, limits)
    # allocated once for all blocks
    workspace = student.head.new_empty(buffers + capped, min(rows, count), v_eff)
    # kept per token and summed at the end, so that the result does not depend on where blocks begin
    figures = student.head.new_zeros(4, count)
    matches = torch.zeros(count, dtype=torch.bool, device=labels.device)
    for first in range(0, count, rows):
        part = slice(first, min(first + rows, count))
        # a slice is a view, an index tensor copies: the copy is only needed where some rows are masked
        block = part if count == len(labels) else problem.kept[part]
        space = workspace[:, : part.stop - first]
        # [rows, H] and [rows, V]
        hidden = student.hidden(block)
        logits = student.into(hidden, space[0])
        # taken now: _block overwrites the logits
        capped_slope = _slope_of_cap(logits, problem.student.transform, space[-1]) if capped else None
        values, slope = _block(problem, taught, logits, labels[block], block, space, gradient=gradients.any)
        _store(values, figures[:, part], matches[part])
        if slope is not None:
            _add(gradients, _through(slope, problem.student.transform, capped_slope), block, hidden, student.head)
    return *figures.sum(1).unbind(), matches.sum()


def _buffers(teacher: HiddenStates | TeacherLogits | SparseTargets | None) -> int:
    """Number of [n, V] buffers of a block, logits included."""
    if isinstance(teacher, SparseTargets):
        return 1 + SPARSE_BUFFERS
    return 1 + BUFFERS_ALONE if teacher is None else 2 + BUFFERS_WITH_TEACHER


def _add(gradients: Gradients, slope: Tensor, block: Tensor | slice, hidden: Tensor, head: Tensor) -> None:
    """Adds the share of one block, whose gradient with respect to the product is ``slope`` [n, V]."""
    v_eff = slope.shape[1]
    if gradients.hidden is not None:
        if isinstance(block, slice):
            torch.mm(slope, head, out=gradients.hidden[block])
        else:
            gradients.hidden[block] = slope @ head
    if gradients.head is not None:
        gradients.head[:v_eff].addmm_(slope.T, hidden)
    if gradients.bias is not None:
        gradients.bias[:v_eff] += slope.sum(0)


def _block(
    problem: Problem,
    teacher: _Product | TeacherLogits | SparseTargets | None,
    logits: Tensor,
    labels: Tensor,
    block: Tensor | slice,
    space: Tensor,
    *,
    gradient: bool,
) -> tuple[BlockValues, Tensor | None]:
    """Figures of one block and the gradient with respect to its final logits; ``logits`` are ``space[0]``."""
    if teacher is None:
        return cross_entropy_block(logits, labels, space[1], gradient=gradient)
    if isinstance(teacher, SparseTargets):
        return sparse_block(logits, teacher[block], labels, space[1:3].unbind(), problem, gradient=gradient)
    if isinstance(teacher, _Product):
        theirs = teacher.into(teacher.hidden(block), space[1])
    else:
        theirs = space[1].copy_(teacher.logits[block, : problem.v_eff])
    return divergence_block(logits, theirs, labels, space[2:5].unbind(), problem, gradient=gradient)


def _slope_of_cap(logits: Tensor, transform: LogitTransform | None, out: Tensor) -> Tensor:
    """Derivative of the final logits with respect to the scaled product: 1 - tanh^2, from the capped values."""
    assert transform is not None
    assert transform.softcap is not None
    return torch.div(logits, transform.softcap, out=out).square_().neg_().add_(1)


def _through(slope: Tensor, transform: LogitTransform | None, capped_slope: Tensor | None) -> Tensor:
    """Gradient with respect to the product, from the gradient with respect to the final logits; overwrites ``slope``."""
    if capped_slope is not None:
        slope = slope.mul_(capped_slope)
    return slope if transform is None or transform.logit_scale == 1 else slope.mul_(transform.logit_scale)


def _store(values: BlockValues, figures: Tensor, matches: Tensor) -> None:
    matches.copy_(values.top1_matches)
    for row, value in enumerate((values.loss, values.cross_entropy, values.kl, values.teacher_entropy)):
        if value is not None:
            figures[row] = value
