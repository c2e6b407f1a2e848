"""linear_divergence with one Triton kernel between the matrix products, for GPUs; it computes the same as ``reference`` and ``chunked``.

Logits of a few hundred rows are held at once, in fp32 as the product gives them (bf16 operands are multiplied as they are and summed in
fp32). Slopes (gradients with respect to the product) are collected over more rows, because every product that adds to the head's gradient
reads and writes all of it. bf16 operands get bf16 slopes: that is a relative error of 2^-9 each, while logits rounded to bf16 would make
an error several times as large as the gradient.
"""

import importlib.util
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from ..divergences import head_threshold
from ..settings import Divergence
from ..settings_own import OwnLossSettings
from ..sparse import SparseTargets
from ..sums import LossSums
from .gradients import Gradients, sums_with_gradients
from .inputs import HiddenStates, Problem, TeacherLogits

LOGIT_BYTES = 2**29
"""Bytes of both models' logits that are held at once."""
SLOPE_BYTES = 2**30
"""Bytes of slopes that are held at once."""
_MAX_BLOCK = 4096
_ROW_TILE = 128
"""Matrix products with a multiple of this many rows leave no tile partly empty."""
_KINDS: Mapping[Divergence, str] = {
    "forward_kl": "FORWARD",
    "reverse_kl": "REVERSE",
    "symmetric_kl": "SYMMETRIC",
    "adaptive_kl": "ADAPTIVE",
    "jsd": "JSD",
    "gkd_jsd": "JSD",
    "skew_forward_kl": "SKEW_FORWARD",
    "skew_reverse_kl": "SKEW_REVERSE",
    "total_variation": "VARIATION",
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def can_fuse(problem: Problem) -> bool:
    """Whether ``auto`` takes this back end: tensors on a GPU, none fp64, no sparse targets, no logit of -inf, a divergence of decoct's, and
    triton installed."""
    if isinstance(problem.teacher, SparseTargets) or isinstance(problem.settings, OwnLossSettings) or problem.impossible:
        return False
    return TRITON_INSTALLED and problem.labels.is_cuda and all(dtype in _DTYPES for dtype in _input_dtypes(problem))


def fused_sums(problem: Problem, *, rows: int | None = None, slope_rows: int | None = None) -> LossSums:
    """Computes the sums of ``problem``; ``loss`` has gradients for the student's hidden states, head and bias.

    Args:
        problem: The checked inputs.
        rows: Rows whose logits are held at once; None = as ``LOGIT_BYTES`` allows.
        slope_rows: Rows whose slopes are held at once; None = as ``SLOPE_BYTES`` allows.

    Raises:
        ValueError: triton is not installed or cannot run on this device, a tensor is fp64, the teacher is given by sparse targets, the
            divergence is the user's, or a logit may be -inf.
    """
    if problem.impossible:
        raise ValueError("backend='triton' does not take logits of -inf (a token of probability 0); use backend='auto'")
    if isinstance(problem.teacher, SparseTargets):
        raise ValueError("backend='triton' does not take sparse targets; use backend='auto'")
    if isinstance(problem.settings, OwnLossSettings):
        raise ValueError(f"backend='triton' has no kernel for the imported divergence {problem.settings.divergence!r}; use backend='auto'")
    if not TRITON_INSTALLED:
        raise ValueError("backend='triton' needs the triton package; install it or use backend='auto'")
    if wrong := [dtype for dtype in _input_dtypes(problem) if dtype not in _DTYPES]:
        raise ValueError(f"backend='triton' takes float32, bfloat16 and float16, not {wrong[0]}; use backend='auto'")
    from ..linear_divergence import fused_kernel

    import triton  # isort: skip - after the kernel module, which imports it

    interpreted = not isinstance(fused_kernel.loss_kernel, triton.JITFunction)
    device = problem.labels.device
    if not (device.type == "cuda" or (interpreted and device.type == "cpu")):
        raise ValueError(
            f"backend='triton' cannot run on device {device}; use backend='auto', or set TRITON_INTERPRET=1 before triton is first "
            "imported to run the kernel in its interpreter on a CPU"
        )
    return sums_with_gradients(problem, partial(_run, rows=rows, slope_rows=slope_rows, kernel=fused_kernel))


def _input_dtypes(problem: Problem) -> list[torch.dtype]:
    teacher = problem.teacher
    assert not isinstance(teacher, SparseTargets)
    theirs = [teacher.logits] if isinstance(teacher, TeacherLogits) else [] if teacher is None else [teacher.hidden, teacher.head]
    return [tensor.dtype for tensor in (problem.student.hidden, problem.student.head, *theirs)]


def block_rows(count: int, v_eff: int, bytes_each: int, budget: int) -> int:
    """Rows per block within ``budget`` bytes: whole tiles if at least one fits, in blocks of nearly equal size."""
    most = max(1, budget // (v_eff * bytes_each))
    blocks = -(-count // most)
    rows = -(-count // max(1, blocks))
    # rounded up to whole tiles only if these still fit the budget
    whole = -(-rows // _ROW_TILE) * _ROW_TILE
    return max(1, whole if whole <= most else rows)


class _Operands:
    """Hidden states and head of one model as operands of its products: bf16 on a GPU stays bf16, all else is fp32."""

    def __init__(self, states: HiddenStates, v_eff: int) -> None:
        hidden, head = states.hidden.detach(), states.head.detach()[:v_eff]
        self.low = hidden.is_cuda and hidden.dtype == head.dtype == torch.bfloat16
        self.dtype = torch.bfloat16 if self.low else torch.float32
        self.source, self.head = hidden, head.to(self.dtype)
        self.bias = None if states.bias is None else states.bias.detach()[:v_eff].float()
        transform = states.transform
        self.scale = 1.0 if transform is None else transform.logit_scale
        self.cap = None if transform is None else transform.softcap

    def hidden(self, block: Tensor | slice) -> Tensor:
        """Rows [n, H]."""
        return self.source[block].to(self.dtype)

    def product(self, hidden: Tensor, out: Tensor) -> Tensor:
        """hidden @ head.T [n, V] in fp32, in ``out``."""
        return _multiply(hidden, self.head.T, out)


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left @ right in fp32, also for bf16 operands."""
    if left.dtype == torch.float32:
        return torch.mm(left, right, out=out)
    # torch.mm would round the fp32 sums of bf16 operands to bf16
    return torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in fp32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)


@dataclass(frozen=True, eq=False)
class _Space:
    """Buffers of one call."""

    logits: Tensor
    """[rows, V] fp32."""
    teacher_logits: Tensor | None
    """[rows, V] fp32; None without a teacher, or with one given by logits."""
    slopes: Tensor
    """[slope_rows, V] fp32 or bf16; no rows when no gradient is needed."""
    figures: Tensor
    """[5, tokens] fp32: loss, cross-entropy, KL, teacher entropy, top-1 match."""


def _run(problem: Problem, gradients: Gradients, *, rows: int | None, slope_rows: int | None, kernel: ModuleType) -> tuple[Tensor, ...]:
    """See ``gradients.Run``."""
    count, v_eff, teacher = len(problem.kept), problem.v_eff, problem.teacher
    assert not isinstance(teacher, SparseTargets)
    student = _Operands(problem.student, v_eff)
    taught = _Operands(teacher, v_eff) if isinstance(teacher, HiddenStates) else teacher
    # 4 bytes: logits are fp32, of one model or two
    rows = rows or block_rows(count, v_eff, 4 * (1 + isinstance(taught, _Operands)), LOGIT_BYTES)
    # a multiple of ``rows``, so that no block of logits is split over two collections of slopes
    slope_rows = slope_rows or max(rows, SLOPE_BYTES // (v_eff * student.dtype.itemsize) // rows * rows)
    device, held = problem.labels.device, min(rows, count)
    space = _Space(
        torch.empty(held, v_eff, device=device),
        torch.empty(held, v_eff, device=device) if isinstance(taught, _Operands) else None,
        torch.empty(min(slope_rows, count) if gradients.any else 0, v_eff, device=device, dtype=student.dtype),
        # zeros: without a teacher the kernel writes neither KL nor entropy
        torch.zeros(5, count, device=device),
    )
    # a slice is a view, an index tensor copies: the copy is only needed where some rows are masked
    whole = count == len(problem.labels)
    for first in range(0, count, slope_rows):
        last = min(first + slope_rows, count)
        for begin in range(first, last, rows):
            part = slice(begin, min(begin + rows, last))
            block = part if whole else problem.kept[part]
            slopes = space.slopes[begin - first :][: part.stop - begin] if gradients.any else None
            _block(problem, student, taught, block, part, space, slopes, kernel)
        if gradients.any:
            part = slice(first, last)
            _add(gradients, space.slopes[: last - first], part if whole else problem.kept[part], student)
    *sums, matches = space.figures.sum(1).unbind()
    return *sums, matches.to(torch.int64)


def _block(
    problem: Problem,
    student: _Operands,
    teacher: "_Operands | TeacherLogits | None",
    block: Tensor | slice,
    part: slice,
    space: _Space,
    slopes: Tensor | None,
    kernel: ModuleType,
) -> None:
    """Writes the figures of one block of rows to ``space.figures[:, part]``, and its slopes to ``slopes``."""
    count = part.stop - part.start
    logits = student.product(student.hidden(block), space.logits[:count])
    theirs, rows = logits, None
    if isinstance(teacher, _Operands):
        assert space.teacher_logits is not None
        theirs = teacher.product(teacher.hidden(block), space.teacher_logits[:count])
    elif isinstance(teacher, TeacherLogits):
        # the kernel takes a stride for rows only; it reads the given rows in place, so masked ones are not copied
        theirs = teacher.logits if teacher.logits.stride(1) == 1 else teacher.logits.contiguous()
        rows = torch.arange(part.start, part.stop, device=logits.device) if isinstance(block, slice) else block
    _launch(problem, student, teacher, (logits, theirs, rows), problem.labels[block], space.figures[:, part], slopes, kernel)


def _launch(
    problem: Problem,
    student: _Operands,
    teacher: "_Operands | TeacherLogits | None",
    logits: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    figures: Tensor,
    slopes: Tensor | None,
    kernel: ModuleType,
) -> None:
    """Runs one kernel program per row. Where the kernel reads no pointer, any tensor is passed for it."""
    from ..linear_divergence import fused_math

    settings, (own, theirs, rows) = problem.settings, logits
    model = teacher if isinstance(teacher, _Operands) else None
    soft = teacher is not None and settings.hard_weight < 1
    adaptive = soft and settings.divergence == "adaptive_kl"
    # all slopes but forward KL's need a sum over the vocabulary first: they are written in the third pass
    late = slopes is not None and soft and settings.divergence != "forward_kl"
    # the threshold needs a sort over the vocabulary, which a kernel of one pass cannot do
    head_from = _head_from(problem, model, theirs, rows) if adaptive else figures
    bias, their_bias = student.bias, model.bias if model else None
    # at most one of them is set; otherwise the kernel does not read the number
    dial = next((d for d in (settings.beta, settings.alpha, settings.balance) if d is not None), 0.5)
    # the published JSD is beta (1 - beta) times the kernel's, and so is its gradient
    factor = dial * (1 - dial) if settings.divergence == "gkd_jsd" else 1.0
    # Triton launches on the current device, which need not be that of the tensors
    with torch.cuda.device(own.device) if own.is_cuda else nullcontext():
        kernel.loss_kernel[(len(own),)](
            own, own.stride(0), own if bias is None else bias,
            theirs.view(torch.int16) if theirs.dtype == torch.bfloat16 else theirs, theirs.stride(0),
            labels if rows is None else rows, own if their_bias is None else their_bias,
            labels, head_from, figures, figures.stride(0), own if slopes is None else slopes,
            problem.v_eff, 1.0 / (settings.temperature or 1.0), settings.scale * factor, settings.hard_weight, dial,
            student.scale, student.cap or 1.0, model.scale if model else 1.0, (model.cap if model else None) or 1.0,
            KIND=getattr(fused_math, _KINDS[settings.divergence]), HAS_TEACHER=teacher is not None, TEACHER_ROWS=rows is not None,
            SOFT=soft, HARD=settings.hard_weight > 0, TEMPERED=soft and settings.temperature != 1,
            BOTH_KLS=settings.divergence in ("symmetric_kl", "adaptive_kl"), EARLY=slopes is not None and not late, LATE=late,
            HAS_BIAS=bias is not None, HAS_SCALE=student.scale != 1, HAS_CAP=student.cap is not None,
            TEACHER_BIAS=their_bias is not None, TEACHER_SCALE=model is not None and model.scale != 1,
            TEACHER_CAP=model is not None and model.cap is not None,
            BLOCK=min(_MAX_BLOCK, 1 << (problem.v_eff - 1).bit_length()),
            num_warps=8,
        )  # fmt: skip


def _head_from(problem: Problem, model: "_Operands | None", theirs: Tensor, rows: Tensor | None) -> Tensor:
    """[n] fp32 smallest final teacher logit in adaptive KL's head, by torch, which can sort. It takes further [n, V] buffers."""
    assert problem.settings.temperature is not None
    assert problem.settings.head_mass is not None
    logits = (theirs if rows is None else theirs[rows])[:, : problem.v_eff].float()
    if model is not None:
        logits = logits if model.bias is None else logits + model.bias
        logits = logits if model.scale == 1 else logits * model.scale
        logits = logits if model.cap is None else model.cap * torch.tanh(logits / model.cap)
    p = torch.softmax(logits / problem.settings.temperature, -1)
    inside = p >= head_threshold(p, problem.settings.head_mass)
    lowest = torch.where(inside, logits, torch.inf).amin(-1)
    if model is not None and model.cap is not None:
        # the kernel's tanh may differ in the last bits, and must not drop the token at the threshold
        lowest -= 1e-5 * lowest.abs()
    return lowest


def _add(gradients: Gradients, slopes: Tensor, block: Tensor | slice, student: _Operands) -> None:
    """Adds the share of rows whose gradient with respect to the product is ``slopes`` [n, V]."""
    v_eff = slopes.shape[1]
    if gradients.hidden is not None:
        if isinstance(block, slice):
            _multiply(slopes, student.head, gradients.hidden[block])
        else:
            gradients.hidden[block] = _multiply(slopes, student.head, slopes.new_empty(0, dtype=torch.float32))
    if gradients.head is not None:
        _add_product(gradients.head[:v_eff], slopes.T, student.hidden(block))
    if gradients.bias is not None:
        gradients.bias[:v_eff] += slopes.sum(0, dtype=torch.float32)
