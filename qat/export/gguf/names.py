"""GGUF name of each weight, and the change of rows or values that llama.cpp expects.

RoPE of llama.cpp's ``llama`` architecture (Llama, Mistral) rotates neighbouring channels of a head, transformers the two halves; so the
rows of q and k are reordered, with their codes, scales and biases. Gemma multiplies by 1 + w, llama.cpp by the stored value. GPT-2's Conv1D
stores [in, out]. This module imports no torch, because the plan uses it.

Source: gguf-py ``tensor_mapping.py``; llama.cpp ``conversion/llama.py`` (permute), ``conversion/gemma.py``, ``conversion/gpt2.py``.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ....models.common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
}
"""transformers ``model_type`` -> ``general.architecture``."""

Change = Literal["none", "permute_q", "permute_k", "plus_one", "transpose"]

_TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}
_LAYER = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)")
_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
_PRE_NORM = {**_ATTENTION, "post_attention_layernorm": "ffn_norm"}
_SANDWICH = {
    **_ATTENTION,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GPT2 = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_PARTS = {"gemma2": _SANDWICH, "gemma3": _SANDWICH, "gpt2": _GPT2}


@dataclass(frozen=True)
class Place:
    """Name and change of a weight in the GGUF file."""

    name: str
    """Name in the file, with ``.weight`` or ``.bias``."""
    change: Change


def architecture_of(model_type: str) -> str:
    """Return ``general.architecture``; UserError for a family without a known conversion."""
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"decoct cannot convert model_type {model_type!r} to GGUF; it converts {', '.join(ARCHITECTURES)}. "
            "Export as compressed-tensors, or use a model of one of these families"
        )
    return ARCHITECTURES[model_type]


def gguf_place(name: str, architecture: str) -> Place:
    """Return the place of the weight ``name`` (transformers' name).

    Raises:
        UserError: the architecture has no such weight in llama.cpp.
    """
    module, _, part = name.rpartition(".")
    match = _LAYER.fullmatch(module)
    # the name within a layer, or the whole name outside the layers
    short = match.group(2) if match else module
    # Gemma 2 and 3 have norms before and after attention and FFN, the other families only before
    known = (_PARTS.get(architecture, _PRE_NORM) if match else _TOP).get(short)
    if known is None or part not in ("weight", "bias") or (part == "bias" and not _takes_bias(architecture, known)):
        raise UserError(f"{name}: llama.cpp's {architecture} architecture has no such weight")
    place = f"blk.{match.group(1)}.{known}" if match else known
    return Place(f"{place}.{part}", _change(architecture, known, part))


def _takes_bias(architecture: str, known: str) -> bool:
    """Return whether llama.cpp's loader of the architecture reads this bias."""
    if architecture == "gpt2":
        return True
    # covers attention_bias and mlp_bias of transformers' Llama
    if architecture == "llama":
        return known.startswith(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_"))
    return architecture == "qwen2" and known in ("attn_q", "attn_k", "attn_v")


def _change(architecture: str, known: str, part: str) -> Change:
    if architecture == "llama" and known in ("attn_q", "attn_k"):
        return "permute_q" if known == "attn_q" else "permute_k"
    if architecture.startswith("gemma") and "norm" in known:
        return "plus_one"
    if architecture == "gpt2" and part == "weight" and known in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"):
        return "transpose"
    return "none"


def changed(tensor: "Tensor", change: Change, config: "PreTrainedConfig") -> "Tensor":
    """Return the tensor as llama.cpp expects it. Codes, scales, weights and biases have their rows reordered in the same way.

    Args:
        tensor: [out, ...] in transformers' order.
        change: The change of ``gguf_place``.
        config: The model's config, for the numbers of heads.
    """
    settings: Any = config
    if change == "permute_q":
        return permuted(tensor, settings.num_attention_heads)
    if change == "permute_k":
        return permuted(tensor, getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads)
    if change == "plus_one":
        # fp32: norms are stored as F32, and 1 + w may need more bits than bf16 has
        return tensor.float() + 1
    return tensor.T.contiguous() if change == "transpose" else tensor


def permuted(tensor: "Tensor", heads: int) -> "Tensor":
    """Reorder the rows of each head from halves to pairs: row i of the first half and row i of the second become neighbours."""
    rows = tensor.shape[0]
    # [heads, 2, half, ...] -> [heads, half, 2, ...]
    return tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape).contiguous()
