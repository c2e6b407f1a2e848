"""Which tensors of each family undo each other's scales: written down by hand a second time."""

from typing import Any

import pytest
from transformers import AutoConfig

from decoct.models.couplings import Coupling, couplings, output_norms, uncoupled
from decoct.models.family_map import FAMILIES

from ..support.pruned_families import CONFIGS

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj")
_VALUES = Coupling("self_attn.v_proj", ("self_attn.o_proj",), group=3, block=4)
_INNER = Coupling("mlp.up_proj", ("mlp.down_proj",))


def _gated(before_ffn: str) -> list[Coupling]:
    return [Coupling("input_layernorm", _QKV, norm=True), _VALUES, Coupling(before_ffn, _GATED, norm=True), _INNER]


EXPECTED: dict[str, list[Coupling]] = {
    **{kind: _gated("post_attention_layernorm") for kind in ("llama", "mistral", "qwen2", "qwen3", "smollm3")},
    **{kind: _gated("pre_feedforward_layernorm") for kind in ("gemma2", "gemma3_text")},
    "phi3": [
        Coupling("input_layernorm", ("self_attn.qkv_proj",), norm=True),
        Coupling("self_attn.qkv_proj", ("self_attn.o_proj",), group=3, block=4),
        Coupling("post_attention_layernorm", ("mlp.gate_up_proj",), norm=True),
        Coupling("mlp.gate_up_proj", ("mlp.down_proj",)),
    ],
    "olmo2": [_VALUES, _INNER],
    "gpt2": [
        Coupling("ln_1", ("attn.c_attn",), norm=True),
        Coupling("attn.c_attn", ("attn.c_proj",), block=4),
        Coupling("ln_2", ("mlp.c_fc",), norm=True),
    ],
    "opt": [
        Coupling("self_attn_layer_norm", _QKV, norm=True),
        Coupling("self_attn.v_proj", ("self_attn.out_proj",), block=4),
        Coupling("final_layer_norm", ("fc1",), norm=True),
        Coupling("fc1", ("fc2",)),
    ],
}


def config_of(kind: str, **changes: Any) -> Any:
    return AutoConfig.for_model(kind, **{**CONFIGS[kind], **changes})


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_couplings_of_each_family(kind: str) -> None:
    assert couplings(config_of(kind)) == EXPECTED[kind]


def test_olmo2_has_no_norm_before_a_linear() -> None:
    assert uncoupled(config_of("olmo2")) == [*_QKV, *_GATED]
    assert output_norms(config_of("olmo2"), FAMILIES["olmo2"]) == ["post_attention_layernorm", "post_feedforward_layernorm"]


def test_opt_depends_on_its_config() -> None:
    """Some of its models normalise behind each block, and a nonlinearity other than ReLU does not pass scales on."""
    behind = config_of("opt", do_layer_norm_before=False)
    assert [one.producer for one in couplings(behind)] == ["self_attn.v_proj", "fc1"]
    assert output_norms(behind, FAMILIES["opt"]) == ["self_attn_layer_norm", "final_layer_norm"]
    assert uncoupled(config_of("opt", activation_function="gelu")) == ["fc2"]


def test_gemma_has_norms_of_its_outputs() -> None:
    assert output_norms(config_of("gemma2"), FAMILIES["gemma2"]) == ["post_attention_layernorm", "post_feedforward_layernorm"]
    assert output_norms(config_of("llama"), FAMILIES["llama"]) == []


def test_a_family_without_a_map_has_none() -> None:
    assert couplings(AutoConfig.for_model("falcon")) == []
