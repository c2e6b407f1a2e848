"""Every causal architecture of transformers in a tiny form: its own default config with sizes that fit, by the names of their fields."""

import copy
from typing import Any

import torch

from decoct.models.families import text_config

VOCABULARY = 320
_SIZES: dict[str, Any] = {
    # width
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "emb_dim": 64, "embedding_dim": 64, "dim_model_base": 64, "lru_width": 64,
    "attention_hidden_size": 64, "embedding_size": 64, "input_embedding_size": 64, "output_embedding_size": 64, "word_embed_proj_dim": 64,
    # layers
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2, "num_blocks": 2,
    "num_encoder_layers": 2, "num_decoder_layers": 2, "num_layers_per_stack": 2,
    # heads
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "attention_heads": 4, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "linear_num_heads": 4, "index_n_heads": 4,
    "swa_num_attention_heads": 4, "linear_num_key_heads": 4, "linear_num_value_heads": 4, "num_query_groups": 2,
    "num_key_value_heads": 2, "num_kv_heads": 2, "swa_num_key_value_heads": 2,
    "head_dim": 16, "swa_head_dim": 16, "linear_head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "index_head_dim": 16,
    "kv_channels": 16, "dim_head": 16, "d_head": 16, "attention_head_size": 16, "rotary_dim": 8, "query_pre_attn_scalar": 16,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_head_dim": 32,
    "o_lora_rank": 16,
    # FFN and experts
    "intermediate_size": 128, "ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_ffn_dim": 128, "ffn_hidden_size": 128, "dff": 128,
    "d_inner": 128, "dim_ff": 128, "feed_forward_size": 128, "intermediate_size_mlp": 128, "dense_intermediate_size": 128,
    "moe_intermediate_size": 64, "expert_ffn_hidden_size": 64, "shared_expert_intermediate_size": 64, "shared_intermediate_size": 64,
    "shared_experts_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "zero_expert_num": 2,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    # state spaces
    "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_d_head": 16, "mamba_head_dim": 16, "mamba_headdim": 16, "mamba_d_state": 8,
    "ssm_state_size": 8, "state_size": 8, "mamba_n_groups": 1, "mamba_ngroups": 1, "n_groups": 1, "mamba_d_ssm": 128, "time_step_rank": 8,
    "mamba_dt_rank": 8, "chunk_size": 16, "mamba_chunk_size": 16, "n_mamba_heads": 2, "attention_head_dim": 16, "adapter_rank": 8,
    # tables and windows
    "vocab_size": VOCABULARY, "unpadded_vocab_size": VOCABULARY, "decoder_vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128, "context_length": 128,
    "sliding_window": 64, "sliding_window_size": 64, "attention_window_size": 64, "window_size": 64, "local_attention": 64,
    "hidden_size_per_layer_input": 16, "laurel_rank": 8, "num_kv_shared_layers": 0, "attention_chunk_size": 64,
}  # fmt: skip
"""Field -> its value, where the default config has the field as a number."""

_OF_TYPE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"intermediate_size": [128, 128], "activation_sparsity_pattern": [0.0, 0.0], "altup_num_inputs": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False},
    "roc_bert": {"pronunciation_vocab_size": 64, "shape_vocab_size": 64, "pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "zamba2": {"n_mamba_heads": 8, "layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
"""What the rules above leave wrong for one ``model_type``."""


def architectures() -> list[str]:
    """Every ``model_type`` that AutoModelForCausalLM knows, sorted."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING})


def tiny_config(model_type: str, *, decoder: bool = True) -> Any:
    """The config, in its tiny form; raises what transformers raises where it cannot be made.

    Args:
        decoder: ``is_decoder``, where the config has it.
    """
    from transformers import AutoConfig

    default = AutoConfig.for_model(model_type)
    text = text_config(default)
    fields = _shrunk(text)
    layers = next(
        (fields[name] for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers") if name in fields), 2
    )
    kinds = text.to_dict().get("layer_types")
    if kinds:
        # one layer of each kind, at least two
        distinct = list(dict.fromkeys(kinds))
        chosen = distinct if len(distinct) > 1 else distinct * layers
        fields |= {"layer_types": chosen, "num_hidden_layers": len(chosen)}
    if "is_decoder" in text.to_dict():
        # BERT and its kin: encoders, unless told otherwise
        fields["is_decoder"] = decoder
    if "kv_lora_rank" in fields:
        # keys and values of all heads come from one latent vector
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    fields |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0} | _OF_TYPE.get(model_type, {})
    if text is default:
        return AutoConfig.for_model(model_type, **fields)
    config = copy.deepcopy(default)
    for key, value in fields.items():
        setattr(text_config(config), key, value)
    return config


def _shrunk(config: Any) -> dict[str, Any]:
    plain = config.to_dict()
    return {key: _SIZES[key] for key, value in plain.items() if key in _SIZES and isinstance(value, int) and not isinstance(value, bool)}


def tiny_model(model_type: str, *, decoder: bool = True) -> Any:
    """fp32, random weights of a fixed seed, on the CPU, in eval mode."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type, decoder=decoder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
