"""The axis map of each model family (``axis_map`` says how to read an entry).

One table for all that reshapes a model: stage ``prune``, ``student.keep`` and the plan. A family without a map is refused by name, and so
is a model of a known family that has a tensor without an entry: nothing is guessed. The file imports no torch, because plans ask it.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .axis_map import Axis, Entries, Family, any_layer
from .common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _linear(name: str, out: str, inner: str) -> Entries:
    return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}


def _conv1d(name: str, out: str, inner: str) -> Entries:
    # transformers' Conv1D of GPT-2 keeps its weight as [in, out]
    return {f"{name}.weight": (inner, out), f"{name}.bias": (out,)}


def _norms(*names: str, axis: str = "hidden") -> Entries:
    return {f"{name}.{kind}": (axis,) for name in names for kind in ("weight", "bias")}


_ATTENTION: Entries = {
    **_linear("self_attn.q_proj", "heads", "hidden"),
    **_linear("self_attn.k_proj", "kv_heads", "hidden"),
    **_linear("self_attn.v_proj", "kv_heads", "hidden"),
    **_linear("self_attn.o_proj", "hidden", "heads"),
}
_GATED: Entries = {
    **_linear("mlp.gate_proj", "ffn", "hidden"),
    **_linear("mlp.up_proj", "ffn", "hidden"),
    **_linear("mlp.down_proj", "hidden", "ffn"),
}
# one weight per channel of a head, the same for all heads
_HEAD_NORMS: Entries = {"self_attn.q_norm.weight": ("",), "self_attn.k_norm.weight": ("",)}
_OUTSIDE: Entries = {"model.embed_tokens.weight": ("", "hidden"), "model.norm.weight": ("hidden",), "lm_head.weight": ("", "hidden")}
_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_FIELDS: Mapping[Axis, str] = {
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
}


def _llama(name: str, **different: Any) -> Family:
    """A family with Llama's names."""
    norms = different.setdefault("rms_norms", _TWO_NORMS)
    different.setdefault("norms_before", {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"})
    extra = different.pop("extra", {})
    layer = {**different.pop("layer", {**_ATTENTION, **_GATED}), **_norms(*(norm for norm in norms if norm not in _AXIS_NORMS)), **extra}
    return Family(name=name, layer=layer, outside=_OUTSIDE, fields=_FIELDS, **different)


# OLMo 2 normalises queries and keys over all heads together
_AXIS_NORMS: Mapping[str, str] = {"self_attn.q_norm": "heads", "self_attn.k_norm": "kv_heads"}
_FUSED: Entries = {
    **_linear("self_attn.qkv_proj", "heads+kv_heads+kv_heads", "hidden"),
    **_linear("self_attn.o_proj", "hidden", "heads"),
    **_linear("mlp.gate_up_proj", "ffn+ffn", "hidden"),
    **_linear("mlp.down_proj", "hidden", "ffn"),
}
_GEMMA: dict[str, Any] = {
    "rms_norms": _FOUR_NORMS, "norm_offset": 1.0, "scaled_embedding": True, "whole_heads": True,
    # its other two norms are of a block's outputs
    "norms_before": {"self_attn": "input_layernorm", "mlp": "pre_feedforward_layernorm"},
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _llama("llama", whole_heads=True),
        _llama("mistral"),
        _llama("qwen2", vllm_head_dim=False),
        _llama("qwen3", extra=_HEAD_NORMS),
        _llama("gemma2", **_GEMMA),
        _llama("gemma3_text", extra=_HEAD_NORMS, **_GEMMA),
        _llama("phi3", layer=_FUSED, value="self_attn.qkv_proj", ffn_in="mlp.gate_up_proj"),
        _llama("smollm3"),
        _llama(
            "olmo2",
            rms_norms=("post_attention_layernorm", "post_feedforward_layernorm", *_AXIS_NORMS),
            extra={f"{norm}.weight": (axis,) for norm, axis in _AXIS_NORMS.items()},
            # its norms are of the blocks' outputs: the blocks read the residual stream itself
            norms_before={},
            vllm_head_dim=False,
        ),
        Family(
            name="gpt2",
            layers_path="transformer.h",
            layer={
                **_conv1d("attn.c_attn", "heads+heads+heads", "hidden"),
                **_conv1d("attn.c_proj", "hidden", "heads"),
                **_conv1d("mlp.c_fc", "ffn", "hidden"),
                **_conv1d("mlp.c_proj", "hidden", "ffn"),
                **_norms("ln_1", "ln_2"),
            },
            outside={
                "transformer.wte.weight": ("", "hidden"),
                "transformer.wpe.weight": ("", "hidden"),
                **_norms("transformer.ln_f"),
                "lm_head.weight": ("", "hidden"),
            },
            fields={"ffn": "n_inner", "heads": "n_head", "hidden": "n_embd", "layers": "n_layer"},
            attention="attn",
            attention_out="attn.c_proj",
            ffn_out="mlp.c_proj",
            embedding="transformer.wte",
            final_norm="transformer.ln_f",
            rms_norms=(),
            norms_before={"attn": "ln_1", "mlp": "ln_2"},
            value="attn.c_attn",
            ffn_in=None,
            layer_norm=True,
            own_head_dim=False,
        ),
        Family(
            name="opt",
            layers_path="model.decoder.layers",
            layer={
                **_linear("self_attn.q_proj", "heads", "hidden"),
                **_linear("self_attn.k_proj", "heads", "hidden"),
                **_linear("self_attn.v_proj", "heads", "hidden"),
                **_linear("self_attn.out_proj", "hidden", "heads"),
                **_linear("fc1", "ffn", "hidden"),
                **_linear("fc2", "hidden", "ffn"),
                **_norms("self_attn_layer_norm", "final_layer_norm"),
            },
            outside={
                "model.decoder.embed_tokens.weight": ("", "hidden"),
                "model.decoder.embed_positions.weight": ("", "hidden"),
                # in the models whose table is narrower than their hidden states, of which the hidden size is not cut
                "model.decoder.project_in.weight": ("hidden", ""),
                "model.decoder.project_out.weight": ("", "hidden"),
                **_norms("model.decoder.final_layer_norm"),
                "lm_head.weight": ("", "hidden"),
            },
            fields={"ffn": "ffn_dim", "heads": "num_attention_heads", "hidden": "hidden_size", "layers": "num_hidden_layers"},
            attention_out="self_attn.out_proj",
            ffn="fc1",
            ffn_out="fc2",
            embedding="model.decoder.embed_tokens",
            final_norm="model.decoder.final_layer_norm",
            rms_norms=(),
            norms_before={"self_attn": "self_attn_layer_norm", "fc1": "final_layer_norm"},
            norms_before_field="do_layer_norm_before",
            ffn_in="fc1",
            ffn_relu="activation_function",
            layer_norm=True,
            own_head_dim=False,
        ),
    )
}
"""The map of each family, by ``model_type``."""


def family_of(config_or_model: "PreTrainedConfig | PreTrainedModel") -> Family:
    """The axis map of a transformers config or model.

    Raises:
        UserError: the family has no map; the message says what is missing and lists the families that have one.
    """
    given: Any = config_or_model
    # only a model has modules; isinstance would import torch for a plan
    config, tensors = (given.config, given.state_dict()) if hasattr(given, "named_modules") else (given, ())
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"model_type {config.model_type!r} cannot be reshaped: {no_map(config, tensors)}. Use a model of one of these, or leave out "
            "'prune.structured' and 'student.keep'."
        )
    return family


def no_map(config: Any, tensors: Iterable[str] = ()) -> str:
    """Why a family without an axis map cannot be cut, with the families that have one; ``tensors``: what a map of it would list."""
    known = f"pruning channels and keeping layers know the families {', '.join(sorted(FAMILIES))}"
    if any(isinstance(getattr(config, field, None), int) and getattr(config, field) > 1 for field in _EXPERTS):
        return f"it is a mixture of experts, whose router and experts have no axis map; {known}"
    if kinds := list(dict.fromkeys(any_layer(name) for name in tensors)):
        return f"its axis map is missing, which would say what each dimension is of {', '.join(kinds)}; {known}"
    return known
