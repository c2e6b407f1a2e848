"""Divergences that the user wrote, on log-probabilities, with gradients by autograd (``parts.divergence``)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..parts import PartError
from .logits import log_distributions

if TYPE_CHECKING:
    from .settings_own import OwnLossSettings


def own_divergence(student_logits: Tensor, teacher_logits: Tensor, settings: "OwnLossSettings") -> Tensor:
    """Divergence per token of ``settings.part``, at the temperature of ``settings``, not multiplied by T^2.

    Args:
        student_logits: [..., V], any floating dtype.
        teacher_logits: [..., V], the same vocabulary in the same order; no gradient flows into them.
        settings: Has the user's function, its options and the temperature.

    Returns:
        [...], fp32 (fp64 if either argument is fp64), in nats.

    Raises:
        PartError: the result is not one floating-point number per token.
    """
    shape = student_logits.shape
    log_q, log_p = log_distributions(
        student_logits.reshape(-1, shape[-1]), teacher_logits.detach().reshape(-1, shape[-1]), settings.temperature or 1.0
    )
    value = settings.part.call(log_q, log_p, options=settings.own_options())
    what = f"{settings.part.place}: divergence '{settings.part.name}'"
    if not isinstance(value, Tensor) or value.shape != log_q.shape[:1] or not value.is_floating_point():
        got = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise PartError(f"{what} must return one number per token, a floating tensor of shape [{len(log_q)}] here; it returned {got}")
    if log_q.requires_grad and not value.requires_grad:
        raise PartError(f"{what} returned a value that does not depend on the student's log-probabilities; no gradient reaches the student")
    return value.to(log_q.dtype).reshape(shape[:-1])


def own_block(logits: Tensor, teacher_logits: Tensor, settings: "OwnLossSettings", *, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Value and gradient for a block of rows, for the block-wise back ends.

    Args:
        logits: [n, V] final logits of the student.
        teacher_logits: [n, V] final logits of the teacher.
        settings: As for ``own_divergence``.
        gradient: Whether to compute the gradient.

    Returns:
        (divergence [n], T times its gradient with respect to ``logits`` [n, V] or None), as ``slopes.soft`` has them.
    """
    if not gradient:
        with torch.no_grad():
            return own_divergence(logits, teacher_logits, settings), None
    # the block-wise back ends run inside an autograd node, where gradients are off
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        value = own_divergence(leaf, teacher_logits, settings)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), slope.mul_(settings.temperature or 1.0)
