"""Losses between hidden states of a student and of its teacher, per token."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .settings_features import HiddenLoss


def hidden_loss(student: Tensor, teacher: Tensor, kind: "HiddenLoss", projector: Tensor | None = None) -> Tensor:
    """Distance of two hidden states per token.

    With d = W s - t, for student s, teacher t and projector W (the identity without one):

    - ``mse``: |d|^2 / H_t
    - ``nmse``: |d|^2 / |t|^2, which is not ruled by the few tokens with very large states
    - ``cosine``: 1 - (W s) . t / (|W s| |t|) (DistilBERT, arXiv 1910.01108)

    A state of zeros has cosine 0 with every other one, and counts with |t|^2 = 1e-12 in ``nmse``.

    Args:
        student: [N, H_s], any floating dtype.
        teacher: [N, H_t], any floating dtype; no gradient flows into it.
        kind: The distance.
        projector: [H_t, H_s]; needed where the widths differ.

    Returns:
        [N], fp32 (fp64 if ``student`` is fp64).

    Raises:
        ValueError: the shapes do not fit each other.
    """
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    # under autocast the product would be rounded to bf16
    with torch.autocast(student.device.type, enabled=False):
        own, theirs = student.to(dtype), teacher.detach().to(dtype)
        if projector is not None:
            own = own @ projector.to(dtype).T
        if own.shape != theirs.shape or own.ndim != 2:
            raise ValueError(
                f"hidden states of shape {tuple(student.shape)} and {tuple(teacher.shape)} do not fit each other; give a projector of "
                f"shape [{teacher.shape[-1]}, {student.shape[-1]}]"
            )
        if kind == "cosine":
            # the norms are clamped one by one, so that a gradient through a state of zeros stays finite
            return 1 - torch.nn.functional.cosine_similarity(own, theirs, dim=1, eps=1e-8)
        squared = (own - theirs).square()
        return squared.mean(1) if kind == "mse" else squared.sum(1) / theirs.square().sum(1).clamp(min=1e-12)
