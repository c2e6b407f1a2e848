"""AdamW over a student's parameters, with decay where it belongs."""

from collections.abc import Mapping

import torch
from torch import nn

from ..models.errors import UserError
from .plan import TrainingPlan


def build_optimizer(student: nn.Module, plan: TrainingPlan, views: Mapping[str, nn.Parameter] | None = None) -> torch.optim.AdamW:
    """AdamW with fp32 moments; matrices decay, norms, biases and embeddings (a tied head with them) do not.

    Raises: UserError when a trainable parameter is not fp32 (bf16 steps smaller than 2^-8 of a weight are lost), or none is left.
    """
    embeddings = {id(module.weight) for module in student.modules() if isinstance(module, nn.Embedding)}
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, owner in student.named_parameters():
        parameter = owner if views is None else views.get(name, owner)
        if not parameter.requires_grad:
            continue
        if parameter.dtype not in (torch.float32, torch.float64):
            raise UserError(f"{name} is {parameter.dtype}; training needs fp32 weights: load the student with dtype=torch.float32")
        (decaying if parameter.ndim >= 2 and id(owner) not in embeddings else others).append(parameter)
    groups = [{"params": decaying, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise UserError("the student has no trainable parameter (requires_grad is False everywhere)")
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=plan.betas, eps=1e-8)
