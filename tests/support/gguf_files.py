"""GGUF files of tiny models, written with the package ``gguf`` and conversions worked out here: nothing is shared with decoct."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL: dict[str, Any] = {
    **SIZES,
    "vocab_size": 260,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "smollm3": {"num_hidden_layers": 5, "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1},
    "qwen3_moe": {**EXPERTS, "head_dim": 16, "norm_topk_prob": True, "decoder_sparse_step": 1},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32, "num_hidden_layers": 7},
    "phi3": {"sliding_window": None},
    "starcoder2": {"use_bias": True, "sliding_window": None, "tie_word_embeddings": True},
    "stablelm": {"use_qkv_bias": True},
    "nemotron": {"head_dim": 16},
    "gpt2": {},
}
"""transformers' model type -> fields of its tiny config beyond ``SMALL``."""
ARCHITECTURES = {
    "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3",
}  # fmt: skip


def tiny(model_type: str, **fields: Any) -> Any:
    """A random model in fp32 whose norms and biases are not the identity."""
    torch.manual_seed(3)
    given = {**SMALL, **FAMILIES[model_type], **fields}
    if model_type == "gpt2":
        given = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 260} | {"n_inner": 96} | fields
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **given), dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def metadata_of(model: Any) -> dict[str, Any]:
    """Keys after the architecture, as llama.cpp's converter writes them."""
    c = model.config
    kind = c.model_type
    if kind == "gpt2":
        return {
            "block_count": c.n_layer, "context_length": c.n_positions, "embedding_length": c.n_embd, "feed_forward_length": c.n_inner,
            "attention.head_count": c.n_head, "attention.layer_norm_epsilon": float(c.layer_norm_epsilon),
        }  # fmt: skip
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    eps = next(getattr(c, name) for name in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps") if hasattr(c, name))
    eps_key = "layer_norm_epsilon" if kind in ("starcoder2", "stablelm", "nemotron") else "layer_norm_rms_epsilon"
    found = {
        "block_count": c.num_hidden_layers, "context_length": c.max_position_embeddings, "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size, "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads, f"attention.{eps_key}": float(eps), "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
    }  # fmt: skip
    if head_dim != c.hidden_size // c.num_attention_heads or kind.startswith("gemma"):
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if kind in ("gemma2", "gemma3_text"):
        found["attention.sliding_window"] = c.sliding_window
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(c, key, None):
                found[key] = float(getattr(c, key))
    if kind in ("mixtral", "qwen2_moe", "qwen3_moe"):
        found |= {"expert_count": getattr(c, "num_experts", None) or c.num_local_experts, "expert_used_count": c.num_experts_per_tok}
    if kind in ("qwen2_moe", "qwen3_moe"):
        found["expert_feed_forward_length"] = c.moe_intermediate_size
    if kind == "qwen2_moe":
        found["expert_shared_feed_forward_length"] = c.shared_expert_intermediate_size
    if kind == "stablelm":
        found["use_parallel_residual"] = bool(c.use_parallel_residual)
    return found


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """The tensors of a file, fp32, under llama.cpp's names and in its order."""
    c = model.config
    kind = c.model_type
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES.get(kind, kind))
    names = gguf.get_tensor_name_map(arch, getattr(c, "num_hidden_layers", 2))
    found: dict[str, np.ndarray] = {}
    tied = c.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if (tied and name == "lm_head.weight") or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        values = tensor.detach().numpy()
        if name.endswith("mlp.experts.gate_up_proj"):
            layer, half = name.split(".")[2], values.shape[1] // 2
            found[f"blk.{layer}.ffn_gate_exps.weight"], found[f"blk.{layer}.ffn_up_exps.weight"] = values[:, :half], values[:, half:]
            continue
        if name.endswith("mlp.experts.down_proj"):
            found[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"] = values
            continue
        stem, part = name.rsplit(".", 1)
        if kind == "mixtral":
            stem = stem.replace("mlp.gate", "block_sparse_moe.gate")
        short = names.get_name(stem)
        assert short is not None, name
        if kind in ("llama", "mixtral", "smollm3") and "attn_" in short and short.endswith(("_q", "_k")):
            heads = c.num_attention_heads if short.endswith("_q") else c.num_key_value_heads
            # row by row: rows i and i + half of a head become neighbours
            half = len(values) // heads // 2
            order = [head * 2 * half + row for head in range(heads) for i in range(half) for row in (i, i + half)]
            values = values[order]
        if (kind.startswith("gemma") or kind == "nemotron") and "norm" in short and part == "weight":
            values = values + np.float32(1)
        if kind == "gpt2" and part == "weight" and short.endswith(("attn_qkv", "attn_output", "ffn_up", "ffn_down")):
            values = values.T
        if short.endswith("ffn_gate_inp_shexp"):
            values = values.reshape(-1)
        found[f"{short}.{part}"] = np.ascontiguousarray(values)
    return found


def tokenizer_keys(tokenizer: Any) -> dict[str, Any]:
    """Metadata of a byte-level BPE tokenizer that splits like GPT-2."""
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    special = set(tokenizer.all_special_tokens)
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]] or ["a b"],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.padding_token_id": 0,
    }  # fmt: skip


def write_gguf(
    file: Path,
    architecture: str,
    keys: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    type_of: Callable[[str, np.ndarray], Type] = lambda name, values: Type.F32,
) -> Path:
    """Write a file with the package ``gguf``; a key with value None is left out."""
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in keys.items():
        name = key if key.startswith(("tokenizer.", "general.", "split.")) else f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            (writer.add_int32 if value < 0 else writer.add_uint32)(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    for name, values in tensors.items():
        kind = type_of(name, values) if values.ndim > 1 else Type.F32
        if kind in (Type.F32, Type.F16):
            writer.add_tensor(name, values.astype(np.float32 if kind == Type.F32 else np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values, np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_of(file: Path, model: Any, tokenizer: Any = None, type_of: Any = lambda name, values: Type.F32, **changes: Any) -> Path:
    """The file of a model; ``changes`` replace metadata (dots written as '__'), None leaves a key out."""
    keys = {**metadata_of(model), **(tokenizer_keys(tokenizer) if tokenizer is not None else {})}
    keys |= {name.replace("__", "."): value for name, value in changes.items()}
    kind: str = model.config.model_type
    return write_gguf(file, ARCHITECTURES.get(kind, kind), keys, tensors_of(model), type_of)
