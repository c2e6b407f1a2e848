"""The transformers config of a GGUF file, from its metadata.

Everything that decides what the model computes is set, also where it equals transformers' default, which is one checkpoint's number. A
file whose metadata contradicts itself, or asks for what transformers computes differently, is refused by the name of the key.

Source: llama.cpp ``llama-model.cpp`` (load_hparams and the graph of each architecture); transformers ``configuration_*.py``.
"""

from collections.abc import Callable
from typing import Any

from ..common.errors import UserError
from .fields import Fields
from .rope import rope_parameters

_PERIOD = {"gemma2": 2, "gemma3": 6}
"""Every n-th layer has full attention, unless the file says otherwise."""
_WHOLE_SCALE = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, whose attention llama.cpp scales by hidden / heads instead of by head_dim."""


def config_fields(fields: Fields) -> dict[str, Any]:
    """The fields of config.json, including ``model_type``.

    Raises:
        UserError: the architecture is unknown, or a key is missing or contradicts another one.
    """
    build = ARCHITECTURES.get(fields.architecture)
    if build is None:
        raise UserError(
            f"{fields.file.path}: decoct cannot import the architecture {fields.architecture!r:.100}; it knows {', '.join(ARCHITECTURES)}. "
            "Give the model's folder for transformers instead"
        )
    table = fields.file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise UserError(f"{fields.file.path}: the embedding token_embd.weight is missing; the file is no complete language model")
    return {
        "vocab_size": table.shape[0],
        # llama.cpp's rule: without a tensor for the head, the embedding's table is used
        "tie_word_embeddings": "output.weight" not in fields.file.tensors,
        **_token_ids(fields, table.shape[0]),
        **build(fields),
    }


def expert_count(fields: Fields) -> int:
    """Experts per layer; 0 without."""
    return fields.whole(".expert_count", 0, least=0)


def _token_ids(fields: Fields, rows: int) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        index = fields.whole(f"tokenizer.ggml.{key}_token_id", None, least=0)
        # no row of the embedding: older converters write 2^32 - 1 for 'none'
        found[f"{name}_token_id"] = index if index is None or index < rows else None
    return found


def _has(fields: Fields, name: str) -> bool:
    return f"blk.0.{name}" in fields.file.tensors


def _sizes(fields: Fields) -> dict[str, Any]:
    """What every decoder has. ``head_dim`` is in it, because some model types derive it otherwise."""
    heads, hidden = fields.whole(".attention.head_count"), fields.whole(".embedding_length")
    kv_heads = fields.whole(".attention.head_count_kv", heads)
    if heads % kv_heads:
        # grouped-query attention: every key/value head serves the same number of query heads
        raise fields.error(".attention.head_count_kv", kv_heads, f"a divisor of the {heads} query heads")
    width = fields.whole(".attention.key_length", None)
    if width is None and hidden % heads:
        raise fields.error(".attention.head_count", heads, f"a divisor of the {hidden} channels, or .attention.key_length")
    head_dim = width or hidden // heads
    # transformers' classes have one width for both
    if fields.whole(".attention.value_length", head_dim) != head_dim:
        raise fields.error(".attention.value_length", fields.get(".attention.value_length"), f"the width of keys, {head_dim}")
    return {
        "hidden_size": hidden,
        "num_hidden_layers": fields.whole(".block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": fields.whole(".context_length"),
    }


def _decoder(fields: Fields, model_type: str, eps: str = "rms_norm_eps", key: str = ".attention.layer_norm_rms_epsilon") -> dict[str, Any]:
    sizes = _sizes(fields)
    return {
        "model_type": model_type,
        **sizes,
        "intermediate_size": fields.whole(".feed_forward_length"),
        eps: fields.number(key),
        "rope_parameters": rope_parameters(fields, sizes["head_dim"]),
    }


def _derived_head_dim(fields: Fields, found: dict[str, Any]) -> dict[str, Any]:
    """``found`` without ``head_dim``, for model types that always compute it from the hidden size and the heads."""
    hidden, heads, width = found["hidden_size"], found["num_attention_heads"], found["head_dim"]
    # multiplied: a rounded quotient would equal a width that is none
    if width * heads != hidden:
        kind = found["model_type"]
        raise fields.error(".attention.key_length", fields.get(".attention.key_length"), f"hidden size / heads: {kind} has no other width")
    return {name: value for name, value in found.items() if name != "head_dim"}


def _llama(fields: Fields) -> dict[str, Any]:
    experts = expert_count(fields)
    # llama.cpp multiplies by these; 0 and 1 mean none
    for key in (".attention.scale", ".logit_scale", ".embedding_scale", ".residual_scale"):
        if fields.get(key) not in (None, 0, 0.0, 1, 1.0):
            # models that are llama in all but these scales would compute other numbers
            raise fields.error(key, fields.get(key), "no scale: transformers' llama has none")
    if experts:
        used = fields.whole(".expert_used_count")
        # llama.cpp calls Mixtral 'llama' with experts
        return {**_decoder(fields, "mixtral"), "hidden_act": "silu", "num_local_experts": experts, "num_experts_per_tok": used}
    # Llama has biases in all four projections or in none
    biases = {"attention_bias": _has(fields, "attn_q.bias"), "mlp_bias": _has(fields, "ffn_up.bias")}
    return {**_decoder(fields, "llama"), "hidden_act": "silu", **biases}


def _smollm3(fields: Fields) -> dict[str, Any]:
    layers = fields.whole(".block_count")
    # llama.cpp builds it in: every fourth layer has no rotary positions
    rotary = [int((layer + 1) % 4 != 0) for layer in range(layers)]
    biases = {"attention_bias": _has(fields, "attn_q.bias"), "mlp_bias": _has(fields, "ffn_up.bias")}
    return {**_decoder(fields, "smollm3"), "hidden_act": "silu", "no_rope_layers": rotary, "use_sliding_window": False, **biases}


def _qwen(model_type: str) -> Callable[[Fields], dict[str, Any]]:
    def build(fields: Fields) -> dict[str, Any]:
        found = {**_decoder(fields, model_type), "hidden_act": "silu", "use_sliding_window": False}
        # newer members of the family have a switch for biases; Qwen2 has them on q, k and v always
        if model_type == "qwen3":
            found["attention_bias"] = _has(fields, "attn_q.bias")
            return found
        return _derived_head_dim(fields, found)

    return build


def _qwen_experts(model_type: str) -> Callable[[Fields], dict[str, Any]]:
    def build(fields: Fields) -> dict[str, Any]:
        sizes = _sizes(fields)
        # older files have no key for the width of an expert
        width = fields.whole(".expert_feed_forward_length", None) or _expert_width(fields)
        found = {
            "model_type": model_type,
            **sizes,
            "intermediate_size": fields.whole(".feed_forward_length", width),
            "moe_intermediate_size": width,
            "num_experts": fields.whole(".expert_count"),
            "num_experts_per_tok": fields.whole(".expert_used_count"),
            # Qwen3 divides by the sum of the chosen experts' probabilities, Qwen2 does not
            "norm_topk_prob": model_type == "qwen3_moe",
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "rms_norm_eps": fields.number(".attention.layer_norm_rms_epsilon"),
            "hidden_act": "silu",
            "use_sliding_window": False,
            "rope_parameters": rope_parameters(fields, sizes["head_dim"]),
        }
        if model_type == "qwen2_moe":
            found["shared_expert_intermediate_size"] = fields.whole(".expert_shared_feed_forward_length")
            return _derived_head_dim(fields, found)
        return found

    return build


def _expert_width(fields: Fields) -> int:
    """FFN channels of an expert, from its tensor: older files have no key for it."""
    tensor = fields.file.tensors.get("blk.0.ffn_up_exps.weight")
    if tensor is None or len(tensor.shape) != 3:
        raise UserError(
            f"{fields.file.path}: neither {fields.architecture}.expert_feed_forward_length nor blk.0.ffn_up_exps.weight is there"
        )
    return tensor.shape[1]


def _gemma(fields: Fields) -> dict[str, Any]:
    return {**_decoder(fields, "gemma"), "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _gemma_sandwich(model_type: str) -> Callable[[Fields], dict[str, Any]]:
    def build(fields: Fields) -> dict[str, Any]:
        architecture = fields.architecture
        found = {**_decoder(fields, model_type), "hidden_activation": "gelu_pytorch_tanh"}
        layers, heads = found["num_hidden_layers"], found["num_attention_heads"]
        # the file does not say it: llama.cpp knows the 27B models by their depth
        whole = layers == _WHOLE_SCALE[architecture]
        period = fields.whole(".attention.sliding_window_pattern", _PERIOD[architecture])
        found |= {
            "query_pre_attn_scalar": found["hidden_size"] // heads if whole else found["head_dim"],
            "sliding_window": fields.whole(".attention.sliding_window"),
            # the last layer of each period sees everything
            "layer_types": ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)],
            "attn_logit_softcapping": fields.number(".attn_logit_softcapping", None),
            "final_logit_softcapping": fields.number(".final_logit_softcapping", None),
        }
        if architecture == "gemma3":
            # local layers have frequencies of their own, never scaled
            local = {"rope_theta": fields.number(".rope.freq_base_swa", 10000.0), "rope_type": "default"}
            found["rope_parameters"] = {"full_attention": found["rope_parameters"], "sliding_attention": local}
            # transformers' default may differ from what the file was made of
            found["use_bidirectional_attention"] = False
        return found

    return build


def _phi3(fields: Fields) -> dict[str, Any]:
    found = _derived_head_dim(fields, _decoder(fields, "phi3"))
    # 0 stands for none
    window = fields.whole(".attention.sliding_window", 0, least=0)
    trained = fields.whole(".rope.scaling.original_context_length", found["max_position_embeddings"])
    return {**found, "hidden_act": "silu", "sliding_window": window or None, "original_max_position_embeddings": trained}


def _starcoder2(fields: Fields) -> dict[str, Any]:
    found = _derived_head_dim(fields, _decoder(fields, "starcoder2", "norm_epsilon", ".attention.layer_norm_epsilon"))
    return {**found, "hidden_act": "gelu_pytorch_tanh", "use_bias": _has(fields, "attn_q.bias"), "sliding_window": None}


def _stablelm(fields: Fields) -> dict[str, Any]:
    found = _derived_head_dim(fields, _decoder(fields, "stablelm", "layer_norm_eps", ".attention.layer_norm_epsilon"))
    # without the file's word: a layer with one norm feeds attention and FFN side by side
    parallel = fields.flag(".use_parallel_residual", not _has(fields, "ffn_norm.weight"))
    return {**found, "hidden_act": "silu", "use_qkv_bias": _has(fields, "attn_q.bias"), "use_parallel_residual": parallel}


def _nemotron(fields: Fields) -> dict[str, Any]:
    found = _decoder(fields, "nemotron", "norm_eps", ".attention.layer_norm_epsilon")
    return {**found, "hidden_act": "relu2", "attention_bias": _has(fields, "attn_q.bias"), "mlp_bias": _has(fields, "ffn_up.bias")}


def _gpt2(fields: Fields) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": fields.whole(".embedding_length"),
        "n_layer": fields.whole(".block_count"),
        "n_head": fields.whole(".attention.head_count"),
        "n_positions": fields.whole(".context_length"),
        "n_inner": fields.whole(".feed_forward_length"),
        "layer_norm_epsilon": fields.number(".attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


ARCHITECTURES: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "llama": _llama,
    "smollm3": _smollm3,
    "qwen2": _qwen("qwen2"),
    "qwen3": _qwen("qwen3"),
    "qwen2moe": _qwen_experts("qwen2_moe"),
    "qwen3moe": _qwen_experts("qwen3_moe"),
    "gemma": _gemma,
    "gemma2": _gemma_sandwich("gemma2"),
    "gemma3": _gemma_sandwich("gemma3_text"),
    "phi3": _phi3,
    "starcoder2": _starcoder2,
    "stablelm": _stablelm,
    "nemotron": _nemotron,
    "gpt2": _gpt2,
}
"""``general.architecture`` -> builder of the config."""
