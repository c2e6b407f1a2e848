"""Any causal language model of transformers: its decoder layers and their linears, backbone and head, logit transform.

What reshapes a model needs the axis map of its family, which ``family_map`` has.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .adapters import effective_head, unwrapped
from .axis_map import Family as Family
from .common.errors import UserError
from .eval_mode import eval_mode
from .family_map import FAMILIES as FAMILIES
from .family_map import family_of as family_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class HeadTransform:
    """Transform of the logits after the head: ``x = logit_scale * x``, then ``softcap * tanh(x / softcap)`` if there is a cap."""

    logit_scale: float = 1.0
    """Factor on the logits (Cohere, Granite, Falcon-H1)."""
    softcap: float | None = None
    """Bound of the logits (Gemma 2 and later, RecurrentGemma, xLSTM)."""

    def apply(self, logits: "Tensor") -> "Tensor":
        """Final logits, shape and dtype of ``logits``."""
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        # the order of transformers' code: scaled first, then capped
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def decoder_linears(model: "PreTrainedModel") -> "dict[str, nn.Linear]":
    """Every ``nn.Linear`` (subclasses too) inside the decoder layers, by full name, in module order.

    This works for any causal language model. If the decoder layers are not found, all linears but the output head are taken; the head and
    embeddings never are. The result is empty for models without ``nn.Linear`` in their layers (GPT-2 uses ``Conv1D``).
    ``capabilities.decoder_weights`` gives the share of the decoder that these linears are.
    """
    from torch import nn

    # by identity, because families call their head by different names
    head = model.get_output_embeddings()
    prefix = layers_prefix(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name.startswith(prefix)
    }


def is_plain_linear(module: "nn.Module") -> bool:
    """Whether a module is ``nn.Linear`` or a subclass that computes the same; only their weights can be rounded on their own."""
    from torch import nn

    # Falcon's own forward computes the same: it only makes bf16 round between product and bias
    return isinstance(module, nn.Linear) and (type(module).forward is nn.Linear.forward or type(module).__name__ == "FalconLinear")


def decoder_layers(model: "PreTrainedModel") -> "list[nn.Module]":
    """The decoder layers, in order; empty if they are not found (no family map, and no ModuleList in the model)."""
    prefix = layers_prefix(model)
    return list(model.get_submodule(prefix.removesuffix(".")).children()) if prefix else []


def layers_prefix(model: "PreTrainedModel") -> str:
    """Name of the ModuleList of decoder layers, with a trailing dot; '' if there is none.

    Without a family map it is the list with the most parameters, of those with as many entries as the config has layers, or else of all.
    """
    from torch import nn

    # the map first: it is known to be right, the search below is a guess by size
    family = FAMILIES.get(model.config.model_type)
    if family is not None:
        return f"{family.layers_path}."
    count = depth_of(model.config)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    # without lists inside other lists, such as the experts of a layer
    outer = {name: module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    # a vision tower or an encoder has a list too: the number of layers decides, then the size
    fitting = {name: module for name, module in outer.items() if len(module) == count} or outer
    return max(fitting, key=lambda name: sum(p.numel() for p in fitting[name].parameters())) + "." if fitting else ""


def text_config(config: "PreTrainedConfig") -> Any:
    """The config of the language model; if there are several (a text encoder and a decoder), the config itself."""
    try:
        return config.get_text_config()
    # ValueError: several sub-configs could be meant
    except ValueError:
        return config


def depth_of(config: "PreTrainedConfig") -> int | None:
    """The number of decoder layers that a config states; None if it has no field of Llama's name for it."""
    # not every config has a number there
    count = getattr(text_config(config), "num_hidden_layers", None)
    return count if isinstance(count, int) else None


def backbone_and_head(model: "PreTrainedModel") -> "tuple[nn.Module, Tensor, Tensor | None]":
    """The backbone and the head of a causal language model, with or without a LoRA adapter of peft.

    Returns:
        (backbone, weight [V_padded, H], bias [V_padded] or None). The input of the head is
        ``backbone(input_ids=..., attention_mask=..., use_cache=False).last_hidden_state`` [B, S, H]. The weight is the embedding table
        itself if they are tied, and a sum with an autograd graph if the head has a LoRA adapter. ``head_transform(model.config)`` follows
        the head.

    Raises:
        UserError: the model has no separate backbone, or no linear head.
    """
    model = unwrapped(model)
    # base_model is the model itself if its prefix names a part that it does not have; the backbone is then under "model"
    backbone = model.base_model if model.base_model is not model else getattr(model, "model", model)
    # as it computes: rounded by QAT, or with its adapter
    weight, bias = effective_head(model.get_output_embeddings())
    if backbone is model or weight is None:
        raise UserError(
            f"{type(model).__name__} is not made of a backbone and a linear output head, which losses and evaluation need; "
            "use a causal language model such as Llama, Mistral, Qwen or Gemma."
        )
    return backbone, weight, bias


def head_transform(config: "PreTrainedConfig") -> HeadTransform:
    """The transform of the logits after the head, for the model of ``config`` (from transformers' modelling code)."""
    text = text_config(config)
    kind: str = text.model_type
    # each family has its own field, and some divide where others multiply
    scale = 1.0
    if kind.startswith("cohere"):
        scale = text.logit_scale
    elif kind.startswith("granite"):
        scale = 1.0 / text.logits_scaling
    elif kind == "hyperclovax":
        scale = text.logits_scaling
    elif kind == "falcon_h1":
        scale = text.lm_head_multiplier
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # the last two are RecurrentGemma's and xLSTM's
    # the first that is set: a config may have the field with None
    softcap = next((cap for name in caps if (cap := getattr(text, name, None)) is not None), None)
    return HeadTransform(logit_scale=float(scale), softcap=None if softcap is None else float(softcap))


def check_head(model: "PreTrainedModel") -> None:
    """Runs four tokens through the whole model and through backbone + head + transform, and compares the logits.

    Losses bypass the model's own head, so a family with a step between head and logits that is not known here would be trained on wrong
    numbers without any error. A model on the meta device is not checked.

    Raises:
        UserError: the two disagree.
    """
    import torch

    with torch.no_grad():
        _, weight, _ = backbone_and_head(model)
        error, allowed = (0.0, 0.0) if weight.is_meta else _head_difference(model)
    # written so that NaN is refused too
    if not error <= allowed:
        raise UserError(
            f"{type(model).__name__} changes its logits between head and output in a way decoct does not know "
            f"(difference {error:.3g} on four tokens); use a model of another family."
        )


def _head_difference(model: "PreTrainedModel") -> tuple[float, float]:
    """(largest difference of the logits of four tokens, the largest one that rounding explains)."""
    import torch
    from torch import nn

    backbone, weight, bias = backbone_and_head(model)
    # four ids, also for a vocabulary of fewer
    ids = torch.arange(4, device=weight.device).remainder(weight.shape[0])[None]
    with eval_mode(model):
        expected = model(input_ids=ids, use_cache=False).logits.float()
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
    # some models (Mamba) keep their hidden states in fp32 for every dtype of the weights, and cast them for the head
    logits = head_transform(model.config).apply(nn.functional.linear(hidden.to(weight.dtype), weight, bias).float())
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2
    # some models cut padding rows off their own logits
    logits = logits[..., : expected.shape[-1]]
    # a token of probability 0 has -inf both ways, and the difference of infinities would be NaN
    error = torch.where(logits == expected, 0.0, logits - expected).abs().max().item()
    return error, tolerance * max(1.0, torch.where(expected.isfinite(), expected, 0.0).abs().max().item())
