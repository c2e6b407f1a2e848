"""Outline of a model: modules of common families by name, order and shape, without transformers' modelling code.

A plan needs only shapes, and the import of that code takes longer than the rest of a plan. transformers builds other families and
unusual configs (``folder.meta``); ``tests/models/test_outline.py`` compares the two.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .folder.meta import meta_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# kinds of rotary positions without weights: they change no shape
_POSITIONS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_BIASES = {"llama": "attention_bias", "qwen3": "attention_bias"}


def outline_of(config: "PreTrainedConfig") -> "PreTrainedModel":
    """The modules of the model of ``config`` on the meta device, for counting only: the result may not run.

    Raises:
        UserError: transformers refuses the config (as ``meta_model``).
    """
    return Outline(config) if has_outline(config) else meta_model(config)  # pyright: ignore[reportReturnType]


class Outline(nn.Module):
    """Causal language model on the meta device with the modules, names and shapes of the real one. It has no forward pass."""

    base_model_prefix = "model"

    def __init__(self, config: "PreTrainedConfig") -> None:
        super().__init__()
        self.config: Any = config
        given = self.config
        width, vocabulary = given.hidden_size, given.vocab_size
        self.model = nn.Module()
        # from_pretrained skips the random initialisation, which imports sympy on the meta device
        self.model.embed_tokens = nn.Embedding.from_pretrained(torch.empty(vocabulary, width, device="meta"), freeze=False)
        self.model.layers = nn.ModuleList(_layer(given) for _ in range(given.num_hidden_layers))
        self.model.norm = _norm(width)
        self.lm_head = _linear(width, vocabulary)
        if given.tie_word_embeddings:
            # one parameter in two places, so that it counts once
            self.lm_head.weight = self.model.embed_tokens.weight
        self.eval()

    @property
    def base_model(self) -> nn.Module:
        """Everything but the head."""
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        """The input embedding."""
        return self.model.get_submodule("embed_tokens")

    def get_output_embeddings(self) -> nn.Module:
        """The output head."""
        return self.lm_head


def has_outline(config: "PreTrainedConfig") -> bool:
    """Whether ``Outline`` knows every module that transformers would build. A config that it may refuse is left to transformers."""
    given: Any = config
    if given.model_type not in ("llama", "mistral", "qwen2", "qwen3") or getattr(given, "is_heterogeneous", False):
        return False
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    if not all(isinstance(getattr(given, name, None), int) and getattr(given, name) > 0 for name in sizes):
        return False
    kinds, pad = getattr(given, "layer_types", None), given.pad_token_id
    return (
        given.hidden_act == "silu"
        and (kinds is None or len(kinds) == given.num_hidden_layers)
        and (pad is None or 0 <= pad < given.vocab_size)
        and (given.rope_parameters or {}).get("rope_type", "default") in _POSITIONS
        and getattr(given, "quantization_config", None) is None
        and _head_width(given) > 0
    )


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _layer(config: Any) -> nn.Module:
    """One decoder layer."""
    width, head = config.hidden_size, _head_width(config)
    # grouped-query attention: keys and values have fewer heads than queries
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    everywhere = bool(getattr(config, _BIASES.get(config.model_type, ""), False))
    # Qwen2 has biases on q, k and v whatever its config holds
    inputs = everywhere or config.model_type == "qwen2"
    attention, ffn, layer = nn.Module(), nn.Module(), nn.Module()
    for name, outputs in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        attention.add_module(name, _linear(width, outputs, bias=inputs))
    attention.add_module("o_proj", _linear(queries, width, bias=everywhere))
    if config.model_type == "qwen3":
        attention.add_module("q_norm", _norm(head))
        attention.add_module("k_norm", _norm(head))
    bias = config.model_type == "llama" and config.mlp_bias
    for name, sides in (("gate_proj", (0, 1)), ("up_proj", (0, 1)), ("down_proj", (1, 0))):
        both = (width, config.intermediate_size)
        ffn.add_module(name, _linear(both[sides[0]], both[sides[1]], bias=bias))
    layer.add_module("self_attn", attention)
    layer.add_module("mlp", ffn)
    layer.add_module("input_layernorm", _norm(width))
    layer.add_module("post_attention_layernorm", _norm(width))
    return layer


class _Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Skips the initialisation: meta tensors have no values, and torch's code for them imports sympy."""


def _linear(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    return _Linear(inputs, outputs, bias=bias, device="meta")


def _norm(width: int) -> nn.Module:
    # the families use RMSNorm classes of their own; only the weight counts here
    norm = nn.Module()
    norm.register_parameter("weight", nn.Parameter(torch.empty(width, device="meta")))
    return norm
