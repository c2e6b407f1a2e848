"""The autograd node of the block-wise back ends: its forward pass computes the gradients, its backward pass scales them.

The forward pass already knows every gradient up to one scalar factor, so it computes them block by block and nothing is computed twice
(the idea of Liger Kernel's fused linear cross-entropy, https://arxiv.org/abs/2410.10989).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..sums import LossSums
from .inputs import Problem

_CAST_ELEMENTS = 2**24
"""Elements that the backward pass scales at once: 64 MB of fp32."""


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of the loss in the problem's dtype, None where none is needed; rows that are masked or padding stay zero."""

    hidden: Tensor | None
    head: Tensor | None
    bias: Tensor | None

    @staticmethod
    def zeros(problem: Problem, *, hidden: bool, head: bool, bias: bool) -> "Gradients":
        """Zeros for the student's tensors that need a gradient."""
        student, dtype = problem.student, problem.dtype
        return Gradients(
            torch.zeros_like(student.hidden, dtype=dtype) if hidden else None,
            torch.zeros_like(student.head, dtype=dtype) if head else None,
            torch.zeros_like(student.bias, dtype=dtype) if bias and student.bias is not None else None,
        )

    @property
    def any(self) -> bool:
        """Whether any gradient is needed."""
        return not (self.hidden is None and self.head is None and self.bias is None)


Run = Callable[[Problem, Gradients], tuple[Tensor, ...]]
"""Fills the gradients and returns loss, cross-entropy, KL, teacher entropy and top-1 matches, summed (0-dim)."""


def sums_with_gradients(problem: Problem, run: Run) -> LossSums:
    """Computes the sums of ``problem`` by ``run``; ``loss`` has gradients for the student's hidden states, head and bias."""
    student = problem.student
    # inside a Function gradients are always off, so it cannot find out by itself whether the caller has them on
    wanted = torch.is_grad_enabled()
    sums = _Loss.apply(student.hidden, student.head, student.bias, problem, run, wanted)
    loss, cross_entropy, kl, entropy, matches = sums
    return LossSums(
        loss=loss,
        tokens=torch.tensor(len(problem.kept), device=problem.kept.device),
        kl=kl,
        cross_entropy=cross_entropy,
        teacher_entropy=entropy,
        top1_matches=matches,
        covered_mass=problem.covered_mass(),
    )


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, problem: Problem, run: Run, wanted: bool) -> Any:
        hidden_wanted, head_wanted, bias_wanted = (wanted and needed for needed in ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = Gradients.zeros(problem, hidden=hidden_wanted, head=head_wanted, bias=bias_wanted)
            # cloned because FSDP2 warns of a loss that is a view
            sums = tuple(part.clone() for part in run(problem, gradients))
        # gradients are in the problem's dtype; backward converts them to that of their tensors
        ctx.dtypes = (hidden.dtype, head.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(gradients.hidden, gradients.head, gradients.bias)
        ctx.mark_non_differentiable(*sums[1:])
        # without this backward would be called with zeros where the loss has no gradient, and would scale everything for nothing
        ctx.set_materialize_grads(False)
        return sums

    @staticmethod
    @once_differentiable
    # torch declares backward without a signature
    def backward(ctx: Any, gradient: Tensor | None, *_: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if gradient is None:
            return (None,) * 6
        scaled = (None if own is None else _scaled(own, gradient, dtype) for own, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return *scaled, None, None, None


def _scaled(own: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``own * factor`` in ``dtype``, in pieces: a head's gradient is large, and the product in its own dtype would be a whole copy."""
    if own.dtype == dtype or own.numel() <= _CAST_ELEMENTS:
        return (own * factor).to(dtype)
    result = torch.empty_like(own, dtype=dtype)
    # [rows, H] per piece of a head's gradient
    rows = max(1, _CAST_ELEMENTS // own[0].numel())
    for first in range(0, len(own), rows):
        torch.mul(own[first : first + rows], factor, out=result[first : first + rows])
    return result
