"""transformers' name of each tensor of a GGUF file, and the change that llama.cpp's converter made, to be undone.

llama.cpp's ``llama`` rotates neighbouring channels of a head, transformers its two halves, so the rows of q and k are reordered. Gemma and
Nemotron multiply by 1 + w, llama.cpp by the stored value. GPT-2's Conv1D stores [in, out]. Experts are one tensor [experts, out, in] in the
file, and one matrix each in transformers' files.

Source: gguf-py ``tensor_mapping.py``; llama.cpp ``conversion/*.py`` (modify_tensors of each model class).
"""

import re
from dataclasses import dataclass
from typing import Literal

from ..common.errors import UserError

Change = Literal["none", "pair_q", "pair_k", "plus_one", "transpose", "experts", "row"]
"""What the converter did: pair_q, pair_k = rows of each head reordered from halves to pairs; experts = stacked; row = [1, n] became [n]."""

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "attn_norm": "input_layernorm",
}  # fmt: skip
_DENSE = {
    **_ATTENTION, "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_SANDWICH = {
    **_DENSE, "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_EXPERTS = {
    **_ATTENTION, "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj", "ffn_up_exps": "mlp.experts.{}.up_proj", "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate", "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj", "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
_MIXTRAL = {
    **_ATTENTION, "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1", "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}  # fmt: skip
_PHI3 = {
    "attn_norm": "input_layernorm", "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_STARCODER2 = {**_ATTENTION, "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
_GPT2 = {
    "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
_GPT2_OUTER = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f", "output": "lm_head",
}  # fmt: skip
_LAYERS = {
    "llama": _DENSE, "mixtral": _MIXTRAL, "smollm3": _DENSE, "qwen2": _DENSE, "qwen3": _DENSE, "qwen2_moe": _EXPERTS, "qwen3_moe": _EXPERTS,
    "gemma": _DENSE, "gemma2": _SANDWICH, "gemma3_text": _SANDWICH, "phi3": _PHI3, "starcoder2": _STARCODER2, "stablelm": _DENSE,
    "nemotron": _DENSE, "gpt2": _GPT2,
}  # fmt: skip
"""transformers' model type -> names inside a layer."""
_PAIRED = ("llama", "mixtral", "smollm3")
_SHIFTED = ("gemma", "gemma2", "gemma3_text", "nemotron")
_BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)")


@dataclass(frozen=True)
class Origin:
    """What a tensor of the file is in transformers' files."""

    names: tuple[str, ...]
    """One name, or one per expert."""
    change: Change


def origin_of(name: str, model_type: str, experts: int) -> Origin:
    """The origin of the tensor ``name`` (llama.cpp's name, with ``.weight`` or ``.bias``).

    Args:
        name: Name in the file.
        model_type: transformers' model type.
        experts: Experts per layer; 0 without.

    Raises:
        UserError: the model type has no such tensor.
    """
    # 'blk.3.attn_q.weight': the part after the last dot says which parameter
    stem, _, part = name.rpartition(".")
    match = _BLOCK.fullmatch(stem)
    gpt2 = model_type == "gpt2"
    if match:
        table, prefix, short = _LAYERS[model_type], f"{'transformer.h' if gpt2 else 'model.layers'}.{int(match[1])}.", match[2]
    else:
        table, prefix, short = _GPT2_OUTER if gpt2 else _OUTER, "", stem
    known = table.get(short)
    if known is None or part not in ("weight", "bias"):
        raise UserError(f"the tensor {name!r:.200} belongs to no {model_type} that transformers knows")
    # one tensor in the file, a matrix per expert in transformers' files
    if "{}" in known:
        return Origin(tuple(f"{prefix}{known.format(index)}.{part}" for index in range(experts)), "experts")
    return Origin((f"{prefix}{known}.{part}",), _change(model_type, short, part))


def _change(model_type: str, short: str, part: str) -> Change:
    if model_type in _PAIRED and short in ("attn_q", "attn_k"):
        return "pair_q" if short == "attn_q" else "pair_k"
    # llama.cpp stores 1 + w, transformers w
    if model_type in _SHIFTED and "norm" in short and part == "weight":
        return "plus_one"
    # Conv1D stores [in, out], llama.cpp [out, in]
    if model_type == "gpt2" and part == "weight" and short in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"):
        return "transpose"
    return "row" if short == "ffn_gate_inp_shexp" else "none"
