"""Builds AdamW over a student's parameters: weight decay for matrices only, moments in 32 or 8 bits."""

from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import nn

from ...models.common.errors import UserError
from ...models.low_bit import check_low_bit, load_bitsandbytes
from ...qat.layers.codes_linear import CodesLinear
from ...qat.layers.quant_linear import RoundedWeight
from ..plan import TrainingPlan

_EPS = 1e-8


def build_optimizer(student: nn.Module, plan: TrainingPlan, views: Mapping[str, nn.Parameter] | None = None) -> torch.optim.Optimizer:
    """The plan's AdamW. Matrices decay; norms, biases, embeddings (with a tied head) and scales of quantizers do not.

    Args:
        student: The model whose trainable parameters are stepped.
        plan: Rates, betas, decay, kind of optimizer.
        views: Tensors to step instead of the parameters of these names: a rank's own rows of them.

    Raises:
        UserError: see ``adamw``.
    """
    tables = {id(module.weight) for module in student.modules() if isinstance(module, nn.Embedding)}
    # by identity and not by name: a tied head is the same parameter as the table, and views have lost the module
    stepped: list[tuple[str, nn.Parameter]] = []
    scales = {id(module.scale) for module in student.modules() if isinstance(module, RoundedWeight | CodesLinear)}
    embeddings: set[int] = set()
    own_rate: set[int] = set()
    for name, owner in student.named_parameters():
        parameter = owner if views is None else views.get(name, owner)
        stepped.append((name, parameter))
        if id(owner) in tables:
            embeddings.add(id(parameter))
        if id(owner) in scales:
            own_rate.add(id(parameter))
    return adamw(stepped, embeddings, plan, own_rate)


def adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]], embeddings: Set[int], plan: TrainingPlan, scales: Set[int] = frozenset()
) -> torch.optim.Optimizer:  # fmt: skip
    """The optimizer over named parameters.

    Args:
        named_parameters: Parameters on their device; frozen ones are left out.
        embeddings: ``id`` of the parameters that are embedding tables.
        plan: ``optimizer`` is adamw (torch, fp32 moments), adamw-8bit or paged-adamw-8bit (bitsandbytes: tensors of at least 4,096
            elements, except scales, have moments of one byte with one fp32 scale per 256; paged moments may leave a full GPU, and on a
            CPU paging has no effect).
        scales: ``id`` of quantizers' scales: no decay, and the plan's own rate for them. A group's ``rate_share`` is its rate as a share
            of the plan's.

    Raises:
        UserError: a trainable parameter is not fp32 (in bf16, steps smaller than 2^-8 of a weight are lost), no parameter is trainable, or
            bitsandbytes is needed and does not work on the parameters' device.
    """
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    quantizers: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        # fp64 is for tests that compare with an oracle
        if parameter.dtype not in (torch.float32, torch.float64):
            raise UserError(f"{name} is {parameter.dtype}; training needs fp32 weights: load the student with dtype=torch.float32")
        if id(parameter) in scales:
            quantizers.append(parameter)
        else:
            (decaying if parameter.ndim >= 2 and id(parameter) not in embeddings else others).append(parameter)
    # the schedule gives one rate per step; each group takes its share of it, see ``TrainingModule._set_rate``
    share = 1.0 if plan.scale_learning_rate is None else plan.scale_learning_rate / plan.learning_rate
    groups: list[dict[str, Any]] = [
        {"params": decaying, "weight_decay": plan.weight_decay, "rate_share": 1.0},
        {"params": others, "weight_decay": 0.0, "rate_share": 1.0},
        # scales are few and each one affects a whole group of weights, so their moments are never stored in 8 bits
        {"params": quantizers, "weight_decay": 0.0, "rate_share": share, "lr": share * plan.learning_rate, "optim_bits": 32},
    ]
    # optimizers refuse an empty group
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise UserError("the student has no trainable parameter (requires_grad is False everywhere)")
    if plan.optimizer == "adamw":
        # fused: one pass over weights, gradients and moments, four times as fast on a CPU; torch's other forms make one pass per operation
        return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=plan.betas, eps=_EPS, fused=True)
    return _low_bit_adamw(groups, plan)


def _low_bit_adamw(groups: list[dict[str, Any]], plan: TrainingPlan) -> torch.optim.Optimizer:
    key = f"trainer.optimizer: {plan.optimizer}"
    bitsandbytes = load_bitsandbytes(key)
    # a rank may hold no row of a small tensor, and bitsandbytes' kernels fail on empty tensors
    held = [{**group, "params": [p for p in group["params"] if p.numel()]} for group in groups]
    device = groups[0]["params"][0].device
    # before the first state is made: kernels of another device would only fail in the first step
    check_low_bit(key, device)
    return _with_full_groups(bitsandbytes.optim.AdamW8bit)(
        [group for group in held if group["params"]],
        lr=plan.learning_rate,
        betas=plan.betas,
        eps=_EPS,
        is_paged=plan.optimizer == "paged-adamw-8bit" and device.type == "cuda",
    )


def _with_full_groups(kind: Any) -> Any:
    """A subclass of bitsandbytes' optimizer in which a group may set ``optim_bits``, the bits of its moments."""

    class FullGroups(kind):
        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            """The settings of one parameter."""
            config = super().get_config(gindex, pindex, group)
            return config | {"optim_bits": group["optim_bits"]} if "optim_bits" in group else config

    return FullGroups
