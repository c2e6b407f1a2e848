"""Sizes of a model for estimates, read from its modules if its config has no field of Llama's name for them.

transformers' configs differ: GPT-2 has ``n_embd``, OPT ``ffn_dim``, Gemma 3n a list of FFN widths, Mamba no heads at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .families import decoder_layers, decoder_linears, text_config

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """Sizes of one causal language model."""

    layers: int
    """Decoder layers."""
    hidden: int
    """Channels of the hidden states."""
    ffn: int
    """Channels of the widest FFN; if the config does not name them, the widest side of a layer's linears."""
    heads: int
    """Query heads; 1 without attention."""
    kv_heads: int
    """Key and value heads; 0 without attention, and so without a KV cache."""
    head_dim: int
    """Channels per head."""
    vocabulary: int
    """Rows of the output head."""


def dimensions(model: "PreTrainedModel") -> Dimensions:
    """The sizes of ``model``, on any device, also meta."""
    return read_dimensions(
        model.config,
        layers=len(decoder_layers(model)),
        sides=[side for linear in decoder_linears(model).values() for side in (linear.out_features, linear.in_features)],
        embedding=_shape(model.get_input_embeddings()),
        head=_shape(model.get_output_embeddings()),
    )


def read_dimensions(
    config: "PreTrainedConfig", *, layers: int, sides: Sequence[int], embedding: tuple[int, int], head: tuple[int, int]
) -> Dimensions:
    """The sizes of the model of ``config``, of which these facts are known. It imports no torch.

    Args:
        config: Config of the model.
        layers: Decoder layers that were found; 0 if none were.
        sides: Inputs and outputs of the decoder's linears.
        embedding: [vocabulary, hidden] of the input embedding; (0, 0) without one.
        head: [vocabulary, hidden] of the output head; (0, 0) without one.
    """
    text = text_config(config)
    # the tables are for configs that name neither size
    hidden = _number(text, "hidden_size", "d_model") or head[1] or embedding[1]
    heads = _number(text, "num_attention_heads") or 0
    return Dimensions(
        layers=layers or _number(text, "num_hidden_layers") or 1,
        hidden=hidden,
        ffn=_number(text, "intermediate_size", "ffn_dim", "ffn_hidden_size")
        # for configs without any known field: the widest linear of a layer is its FFN
        or max(sides, default=4 * hidden),
        heads=heads or 1,
        # multi-query and grouped-query attention have fewer; without a field every query head has its own
        # heads first: a model without attention has no KV cache
        kv_heads=heads and (_number(text, "num_key_value_heads", "num_kv_heads") or heads),
        head_dim=_number(text, "head_dim") or hidden // (heads or 1),
        vocabulary=_number(text, "vocab_size") or head[0] or embedding[0],
    )


def hidden_size(model: "PreTrainedModel") -> int:
    """Channels of the hidden states."""
    return dimensions(model).hidden


def field_of(config: Any, name: str) -> Any:
    """A config's field; a list of its values if layers have their own, and None if there is none."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        # transformers refuses to give one value for layers of different shapes
        return [getattr(layer, name, None) for layer in config.per_layer_config]


def _number(config: Any, *names: str) -> int | None:
    """The first of these fields that is a number above 0; the largest one if layers have different numbers."""
    for name in names:
        value = field_of(config, name)
        numbers = value if isinstance(value, list | tuple) else [value]
        found = [number for number in numbers if isinstance(number, int) and not isinstance(number, bool) and number > 0]
        if found:
            # the largest, because memory is planned for the widest layer
            return max(found)
    return None


def _shape(module: "nn.Module | None") -> tuple[int, int]:
    weight = getattr(module, "weight", None)
    # a table has two dimensions; anything else says nothing of vocabulary and width
    return (int(weight.shape[0]), int(weight.shape[1])) if weight is not None and weight.ndim == 2 else (0, 0)
