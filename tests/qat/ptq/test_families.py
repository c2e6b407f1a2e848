"""GPTQ on families whose linears and layers are not as Llama's: each is better than rounding to nearest on its own text."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.models.batches import backbone_inputs
from decoct.models.families import decoder_linears
from decoct.qat.layers.quantized_model import fold, prepare, quantize_model
from decoct.qat.ptq import CalibrationText, RoundingMethod, round_model
from decoct.qat.spec import QuantSpec

SPEC = QuantSpec(bits=3, group_size=16)
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {**_SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2},
    "falcon": {**_SIZES, "num_kv_heads": 2, "new_decoder_architecture": True, "initializer_range": 0.2},
    "qwen2_moe": {
        **_SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "initializer_range": 0.2,
    },
    "bamba": {
        **_SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16,
        "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8, "initializer_range": 0.2,
    },
    "minicpm3": {
        **_SIZES, "intermediate_size": 64, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "initializer_range": 0.2,
    },
}  # fmt: skip


def model_of(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **FAMILIES[kind]), dtype=torch.float32).eval()


def text_of(padded: bool) -> CalibrationText:
    ids = torch.randint(1, 64, (24, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[::2, 13:] = 0
    return CalibrationText(batches=[{"input_ids": ids[at : at + 8], "attention_mask": mask[at : at + 8]} for at in (0, 8, 16)])


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_gptq_is_nearer_than_rounding(kind: str, padded: bool) -> None:
    text = text_of(padded)

    def outputs(model: Any) -> torch.Tensor:
        found = [model.base_model(**backbone_inputs(batch)).last_hidden_state[batch["attention_mask"].bool()] for batch in text.batches]
        return torch.cat(found)

    exact, nearest, fitted = (model_of(kind) for _ in range(3))
    skip = ["*.shared_expert_gate"] if kind == "qwen2_moe" else []  # its one output is a gate of all experts
    rounded = round_model(fitted, SPEC, RoundingMethod(method="gptq"), skip=skip, text=text)
    fold(nearest, quantize_model(nearest, SPEC, skip))
    errors = [float((outputs(model) - outputs(exact)).norm()) for model in (fitted, nearest)]
    assert errors[0] < 0.9 * errors[1]
    linears = [name for name in decoder_linears(exact) if not name.endswith("shared_expert_gate")]
    assert sorted(rounded.state.modules) == sorted(linears)


def test_falcons_own_linears_are_trained_rounded_as_they_are_stored() -> None:
    model = model_of("falcon")
    ids = torch.arange(1, 13)[None]
    prepare(model, SPEC)
    state = quantize_model(model, SPEC)
    trained = model(input_ids=ids).logits
    fold(model, state)
    torch.testing.assert_close(model(input_ids=ids).logits, trained, rtol=1e-5, atol=1e-5)
