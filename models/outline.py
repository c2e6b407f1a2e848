"""Outline of a model: what a plan reads of it, by arithmetic for common families, without torch and without transformers' modelling code.

A plan needs only names and shapes, and the import of torch takes longer than the rest of a plan. transformers builds other families and
unusual configs (``folder.meta``); ``tests/models/test_outline.py`` compares the two.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from .capabilities import Capabilities, DecoderWeights, answers, capabilities
from .dimensions import Dimensions, dimensions, read_dimensions
from .families import FAMILIES, decoder_layers, decoder_linears, layers_prefix
from .folder.meta import meta_model
from .ties import is_tied

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# kinds of rotary positions without weights: they change no shape
_POSITIONS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_BIASES = {"llama": "attention_bias", "qwen3": "attention_bias"}
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True, kw_only=True)
class Outline:
    """Names and shapes of a model."""

    tensors: dict[str, tuple[int, ...]]
    """Shape of every parameter, in module order; tied ones once."""
    linears: dict[str, tuple[int, int]]
    """(out, in) of every linear of the decoder layers."""
    layer: int
    """Parameters of one decoder layer (the largest)."""
    inside: str
    """Common prefix of the names of the decoder layers' tensors; '' if the layers are not found."""
    embedding: str
    """Name of the input embedding's module."""
    head: str
    """Name of the output head's module; '' when it is tied to the embedding."""
    dimensions: Dimensions
    family: Capabilities
    """What can be done with the model."""


def outline_of(config: "PreTrainedConfig") -> Outline:
    """The outline of the model of ``config``.

    Raises:
        UserError: transformers refuses the config (as ``meta_model``).
    """
    return _computed(config) if has_outline(config) else outlined(meta_model(config))


def outlined(model: "PreTrainedModel") -> Outline:
    """The outline of a model, on any device, also meta."""
    # modules are found by identity, since families call their embedding and head by different names
    names = {id(module): name for name, module in model.named_modules()}
    layers = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)]
    return Outline(
        tensors={name: tuple(p.shape) for name, p in model.named_parameters()},
        linears={name: (linear.out_features, linear.in_features) for name, linear in decoder_linears(model).items()},
        layer=max(layers, default=0),
        inside=layers_prefix(model),
        embedding=names.get(id(model.get_input_embeddings()), ""),
        head="" if is_tied(model) else names.get(id(model.get_output_embeddings()), ""),
        dimensions=dimensions(model),
        family=capabilities(model),
    )


def has_outline(config: "PreTrainedConfig") -> bool:
    """Whether the outline of the model is known without building it. A config that transformers may refuse is left to it."""
    given: Any = config
    # layers of different shapes are not computed here
    if given.model_type not in ("llama", "mistral", "qwen2", "qwen3") or getattr(given, "is_heterogeneous", False):
        return False
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    # a list, with a number per layer, is not computed here
    if not all(isinstance(getattr(given, name, None), int) and getattr(given, name) > 0 for name in sizes):
        return False
    kinds, pad = getattr(given, "layer_types", None), given.pad_token_id
    return (
        # what transformers refuses, or warns of, is left to it
        given.hidden_act == "silu"
        and (kinds is None or len(kinds) == given.num_hidden_layers)
        and (pad is None or 0 <= pad < given.vocab_size)
        and (given.rope_parameters or {}).get("rope_type", "default") in _POSITIONS
        and getattr(given, "quantization_config", None) is None
        and _head_width(given) > 0
    )


def _computed(config: Any) -> Outline:
    width, vocabulary, depth = config.hidden_size, config.vocab_size, config.num_hidden_layers
    inside = f"{FAMILIES[config.model_type].layers_path}."
    parts = list(_layer(config))
    layer = {f"{name}.{kind}": shape for name, kinds in parts for kind, shape in kinds.items()}
    # a matrix of a layer is a linear; vectors are norms and biases
    inner = {name: kinds["weight"] for name, kinds in parts if len(kinds["weight"]) == 2}
    linears = {f"{inside}{index}.{name}": (shape[0], shape[1]) for index in range(depth) for name, shape in inner.items()}
    table = (vocabulary, width)
    tensors: dict[str, tuple[int, ...]] = {f"{_EMBEDDING}.weight": table}
    tensors |= {f"{inside}{index}.{name}": shape for index in range(depth) for name, shape in layer.items()}
    tensors["model.norm.weight"] = (width,)
    # a tied head is the embedding's table, which counts once
    if not config.tie_word_embeddings:
        tensors[f"{_HEAD}.weight"] = table
    elements = {name: prod(shape) for name, shape in linears.items()}
    # computed families have nothing but linears in their layers
    weights = DecoderWeights(total=sum(elements.values()), linears=elements, others={})
    return Outline(
        tensors=tensors,
        linears=linears,
        layer=sum(prod(shape) for shape in layer.values()),
        inside=inside,
        embedding=_EMBEDDING,
        head="" if config.tie_word_embeddings else _HEAD,
        dimensions=read_dimensions(
            config, layers=depth, sides=[side for shape in inner.values() for side in shape], embedding=table, head=table
        ),
        family=answers(config, weights, special={}, headless=None, layered=True),
    )


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _layer(config: Any) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """(module, its parameters) of one decoder layer, in module order."""
    width, head, ffn = config.hidden_size, _head_width(config), config.intermediate_size
    # grouped-query attention: keys and values have fewer heads than queries
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    everywhere = bool(getattr(config, _BIASES.get(config.model_type, ""), False))
    # Qwen2 has biases on q, k and v whatever its config holds
    inputs = everywhere or config.model_type == "qwen2"
    for name, outputs in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield f"self_attn.{name}", _linear(width, outputs, bias=inputs)
    yield "self_attn.o_proj", _linear(queries, width, bias=everywhere)
    # the families use RMSNorm classes of their own; only the weight counts here
    if config.model_type == "qwen3":
        yield "self_attn.q_norm", {"weight": (head,)}
        yield "self_attn.k_norm", {"weight": (head,)}
    bias = config.model_type == "llama" and config.mlp_bias
    yield "mlp.gate_proj", _linear(width, ffn, bias=bias)
    yield "mlp.up_proj", _linear(width, ffn, bias=bias)
    yield "mlp.down_proj", _linear(ffn, width, bias=bias)
    yield "input_layernorm", {"weight": (width,)}
    yield "post_attention_layernorm", {"weight": (width,)}


def _linear(inputs: int, outputs: int, *, bias: bool) -> dict[str, tuple[int, ...]]:
    return {"weight": (outputs, inputs)} | ({"bias": (outputs,)} if bias else {})
