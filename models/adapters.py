"""Models with a LoRA adapter of peft: the base model inside, and the head with its adapter. peft itself is not imported."""

from typing import TYPE_CHECKING, Any

from .common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def unwrapped(model: Any) -> Any:
    """The transformers model inside a peft wrapper, with the adapter's layers in it; any other model is returned unchanged.

    Raises:
        UserError: the adapter adds virtual tokens (prompt or prefix tuning), which the backbone alone does not see.
    """
    # by attribute: peft need not be installed for models without an adapter
    if not hasattr(model, "get_base_model"):
        return model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UserError("the model's adapter learns prompts, which losses on hidden states would leave out; use LoRA")
    # the layers with the adapter are inside the base model, so its forward pass includes the adapter
    return model.get_base_model()


def effective_head(head: Any) -> "tuple[Tensor | None, Tensor | None]":
    """(weight [V, H], bias [V] or None) of a head as it computes: rounded if the head rounds, and with its LoRA part.

    Gradients reach only the adapter if the base is frozen. A head without a weight gives (None, None). Do not read ``head.weight`` of a
    LoRA layer instead: it is the base's weight, and a loss on it would train on other numbers than the model computes.

    Raises:
        UserError: the adapter has dropout, or a form of LoRA that is not a sum of matrices.
    """
    from torch import Tensor, nn

    # peft can train a whole copy of the head instead of an adapter; the copy is then what computes
    if isinstance(getattr(head, "modules_to_save", None), nn.ModuleDict):
        head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
    # QAT: the rounded weight, through which gradients pass straight
    if hasattr(head, "quantized_weight"):
        return head.quantized_weight(), head.bias
    if not hasattr(head, "lora_A"):
        weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
        return (weight if isinstance(weight, Tensor) else None), (bias if isinstance(bias, Tensor) else None)
    base = head.base_layer
    weight = base.weight
    # a merged adapter is in the base's weight already
    if not (head.disable_adapters or head.merged):
        for name in head.active_adapters:
            if name in head.lora_A:
                # [V, H], with a graph to the two small matrices of the adapter
                weight = weight + _update(head, name).to(weight.dtype)
    return weight, base.bias


def _update(head: Any, name: str) -> "Tensor":
    from torch import nn

    dropout = head.lora_dropout[name]
    # dropout would have to be drawn per token, and a sum of matrices has no tokens
    if head.training and getattr(dropout, "p", 0):
        raise UserError(f"the LoRA adapter {name!r} of the output head has dropout {dropout.p}; losses need it to be 0 there")
    if getattr(head, "use_dora", {}).get(name) or not isinstance(head.lora_A[name], nn.Linear) or head.lora_B[name].bias is not None:
        raise UserError(
            f"the adapter {name!r} of the output head is not plain LoRA (two matrices without bias); leave the head out of the adapter"
        )
    # [V, r] @ [r, H]
    return head.scaling[name] * (head.lora_B[name].weight @ head.lora_A[name].weight)
