"""Model hyperparameters as GGUF metadata, from the transformers config; settings that llama.cpp would compute differently are refused.

Source: llama.cpp ``llama-model.cpp`` (load_hparams of each architecture), ``conversion/{base,llama,qwen,gemma,gpt2}.py``.
"""

import math
from typing import TYPE_CHECKING, Any

from ....models.common.errors import UserError
from .container import F32, Value

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROPE_FREQS = "rope_freqs.weight"
"""Tensor with Llama 3's RoPE scaling: fp32 [head_dim / 2], the divisor of each frequency."""
_ACTIVATIONS = {"gemma": "gelu_pytorch_tanh", "gemma2": "gelu_pytorch_tanh", "gemma3": "gelu_pytorch_tanh", "gpt2": "gelu_new"}
_PERIODS = {"gemma2": 2, "gemma3": 6}
"""Period of layers with full attention (every n-th layer), as built into llama.cpp."""
_WHOLE_SCALE = {"gemma2": 46, "gemma3": 62}
"""Number of layers of the 27B models; llama.cpp scales their attention by hidden / heads instead of head_dim."""


def model_metadata(config: "PreTrainedConfig", architecture: str) -> dict[str, Value]:
    """Return the ``<architecture>.*`` entries.

    Raises:
        UserError: llama.cpp would compute something other than transformers; the message names the config's field.
    """
    c: Any = config
    _check_activation(c, architecture)
    if architecture == "gpt2":
        return _gpt2(c)
    heads, keys, head_dim = c.num_attention_heads, c.num_key_value_heads, head_width(config)
    _check_attention(c, architecture, head_dim)
    entries: dict[str, Value] = {
        "block_count": c.num_hidden_layers,
        "context_length": _context(c, architecture),
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": keys,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": F32(c.rms_norm_eps),
        "rope.dimension_count": head_dim,
        **_rope(c, architecture),
    }
    # of the architectures here, only Gemma 2 and 3 have windows and soft caps
    if architecture in _PERIODS:
        entries["attention.sliding_window"] = c.sliding_window
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(c, key, None) is not None:
                entries[key] = F32(getattr(c, key))
    # as llama.cpp's converter writes it
    if architecture == "llama":
        entries["vocab_size"] = c.vocab_size
    return {f"{architecture}.{key}": value for key, value in entries.items()}


def head_width(config: "PreTrainedConfig") -> int:
    """Return the number of channels per attention head."""
    c: Any = config
    # not every config has the field, and some leave it empty
    return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads


def rope_frequency_factors(config: "PreTrainedConfig") -> list[float] | None:
    """Return the content of ``rope_freqs.weight``; None for a model without Llama 3's scaling."""
    c: Any = config
    rope = getattr(c, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    width = head_width(config)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    trained = rope["original_max_position_embeddings"]
    factors = []
    # one divisor per pair of channels, which rotate together
    for pair in range(width // 2):
        # as in transformers' llama3 RoPE: short wavelengths stay, long ones are divided by the factor, the rest is interpolated
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * pair / width)
        if wavelength < trained / high:
            factors.append(1.0)
        elif wavelength > trained / low:
            factors.append(float(factor))
        else:
            smooth = (trained / wavelength - low) / (high - low)
            factors.append(1.0 / ((1 - smooth) / factor + smooth))
    return factors


def _gpt2(c: Any) -> dict[str, Value]:
    if not c.scale_attn_weights or c.scale_attn_by_inverse_layer_idx:
        raise UserError(
            "llama.cpp scales GPT-2's attention by sqrt(head_dim) only; "
            "scale_attn_weights must be true and scale_attn_by_inverse_layer_idx false"
        )
    entries: dict[str, Value] = {
        "block_count": c.n_layer,
        "context_length": c.n_positions,
        "embedding_length": c.n_embd,
        "feed_forward_length": c.n_inner or 4 * c.n_embd,
        "attention.head_count": c.n_head,
        "attention.layer_norm_epsilon": F32(c.layer_norm_epsilon),
    }
    return {f"gpt2.{key}": value for key, value in entries.items()}


def _check_activation(c: Any, architecture: str) -> None:
    # llama.cpp's graph of an architecture has its activation built in; swish is another name of silu
    wanted = _ACTIVATIONS.get(architecture, "silu")
    found = next((value for key in ("activation_function", "hidden_activation", "hidden_act") if (value := getattr(c, key, None))), wanted)
    if found != wanted and not (found == "swish" and wanted == "silu"):
        raise UserError(f"llama.cpp computes {wanted} in the FFN of its {architecture} architecture, config.json has {found!r}")


def _check_attention(c: Any, architecture: str, head_dim: int) -> None:
    if head_dim % 2:
        raise UserError(f"head_dim={head_dim} is odd; rotary positions need pairs")
    if architecture.startswith("gemma") and not c.tie_word_embeddings:
        raise UserError("llama.cpp ties Gemma's output head to its embedding; config.json unties it (tie_word_embeddings)")
    if getattr(c, "use_bidirectional_attention", None):
        raise UserError("use_bidirectional_attention: llama.cpp attends only to earlier tokens")
    layers = list(getattr(c, "layer_types", None) or [])
    period = _PERIODS.get(architecture)
    if period is None:
        if any(kind != "full_attention" for kind in layers):
            raise UserError(f"llama.cpp's {architecture} has no sliding window, but layer_types has one; set use_sliding_window to false")
        return
    wanted = ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(c.num_hidden_layers)]
    if layers != wanted:
        raise UserError(f"llama.cpp's {architecture} attends to everything in every {period}th layer, counted from 1; layer_types differs")
    # the model's 27B form is recognized by its number of layers
    scaled = c.hidden_size // c.num_attention_heads if c.num_hidden_layers == _WHOLE_SCALE[architecture] else head_dim
    if c.query_pre_attn_scalar != scaled:
        raise UserError(f"llama.cpp scales {architecture}'s attention by {scaled}, query_pre_attn_scalar is {c.query_pre_attn_scalar}")


def _context(c: Any, architecture: str) -> int:
    """Return the context length. llama.cpp's ``llama`` has no sliding window, so Mistral is limited to its window, where both compute the
    same."""
    # other architectures of llama.cpp have the window itself, or are refused if the config has one
    window = getattr(c, "sliding_window", None) if architecture == "llama" else None
    return min(c.max_position_embeddings, window or c.max_position_embeddings)


def _rope(c: Any, architecture: str) -> dict[str, Value]:
    rope = c.rope_parameters
    entries: dict[str, Value] = {}
    if architecture == "gemma3":
        # the file has one base and one scaling, which are those of the layers with full attention
        local, rope = rope["sliding_attention"], rope["full_attention"]
        if local["rope_type"] != "default" or local["rope_theta"] != 10000.0:
            raise UserError(f"llama.cpp's gemma3 turns local layers by a base of 10000 without scaling; rope_parameters: {local}")
    entries["rope.freq_base"] = F32(rope["rope_theta"])
    return entries | _rope_scaling(rope)


def _rope_scaling(rope: dict[str, Any]) -> dict[str, Value]:
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError("partial_rotary_factor: only rotary positions over the whole head are exported to gguf")
    if kind in ("default", "llama3"):  # llama3 is stored as the tensor rope_freqs
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": F32(rope["factor"])}
    unusual = {"attention_factor", "mscale", "mscale_all_dim"} & {key for key, value in rope.items() if value is not None}
    # yarn's other parameters are left at llama.cpp's defaults, so other values would be lost
    usual = rope.get("beta_fast") in (None, 32, 32.0) and rope.get("beta_slow") in (None, 1, 1.0) and rope.get("truncate") is not False
    if kind != "yarn" or unusual or not usual or not rope.get("original_max_position_embeddings"):
        raise UserError(f"rope_parameters: gguf holds default, linear, llama3 and plain yarn (its factor and original context), not {rope}")
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": F32(rope["factor"]),
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
    }
