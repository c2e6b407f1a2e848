"""The axis map of each family: it has every tensor of a real model, and what it does not have is refused with what is missing."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.models.common.errors import UserError
from decoct.models.family_map import FAMILIES, family_of, no_map

from ..support.pruned_families import CONFIGS, tiny


def test_the_table_and_the_tests_have_the_same_families() -> None:
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_map_has_every_tensor_and_finds_the_layers(kind: str) -> None:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, num_hidden_layers=2))
    family = family_of(model)
    assert family is family_of(model.config)
    assert family.missing(model.state_dict()) == []
    layers = family.layers(model)
    assert len(layers) == getattr(model.config, family.depth_field)
    modules = dict(layers[0].named_modules())
    assert {family.attention, family.attention_out, family.ffn, family.ffn_out, *family.matrices, *family.rms_norms} <= modules.keys()
    assert model.get_submodule(family.embedding) is model.get_input_embeddings()
    assert model.get_submodule(family.final_norm).weight.shape == (model.config.hidden_size,)


def test_opt_with_a_narrow_table_is_in_the_map() -> None:
    model = tiny("opt", word_embed_proj_dim=16)
    assert "model.decoder.project_in.weight" in model.state_dict()
    assert FAMILIES["opt"].missing(model.state_dict()) == []


def test_matrices_are_outputs_by_inputs_whatever_their_storage() -> None:
    assert FAMILIES["gpt2"].matrices["attn.c_attn"] == ("heads+heads+heads", "hidden")
    assert FAMILIES["gpt2"].matrices["mlp.c_proj"] == ("hidden", "ffn")
    assert FAMILIES["phi3"].matrices["self_attn.qkv_proj"] == ("heads+kv_heads+kv_heads", "hidden")
    assert FAMILIES["llama"].readers() == {
        "self_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "mlp": ["mlp.gate_proj", "mlp.up_proj"],
    }


def test_names_are_renumbered_and_back() -> None:
    family = FAMILIES["opt"]
    assert family.renumbered("model.decoder.layers.5.fc1.weight", [0, 3, 5]) == "model.decoder.layers.2.fc1.weight"
    assert family.renumbered("model.decoder.layers.4.fc1.weight", [0, 3, 5]) is None
    assert family.renumbered("model.decoder.final_layer_norm.weight", [0]) == "model.decoder.final_layer_norm.weight"
    assert family.source("model.decoder.layers.2.fc1.weight", [0, 3, 5]) == "model.decoder.layers.5.fc1.weight"
    assert family.source("lm_head.weight", [0, 3, 5]) == "lm_head.weight"


def test_the_share_of_a_cut() -> None:
    model = tiny("llama")
    matrices = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.ndim > 1}
    attention, ffn = 2 * 24 * 24 + 2 * 24 * 8, 3 * 24 * 20
    share = FAMILIES["llama"].cut_share
    assert share(matrices, ["ffn"]) == pytest.approx(ffn / (attention + ffn))
    assert share(matrices, ["heads"]) == pytest.approx(2 * 24 * 24 / (attention + ffn))
    assert share(matrices, ["kv_heads"]) == pytest.approx(attention / (attention + ffn))
    assert share(matrices, ["hidden"]) == share(matrices, ["layers"]) == 1


def test_an_unknown_family_is_refused_with_what_is_missing_and_what_is_known() -> None:
    config = AutoConfig.for_model("bloom", hidden_size=8, n_layer=2, n_head=2, vocab_size=16, bos_token_id=0, eos_token_id=0)
    known = "know the families gemma2, gemma3_text, gpt2, llama, mistral, olmo2, opt, phi3, qwen2, qwen3, smollm3"
    with pytest.raises(UserError, match=rf"model_type 'bloom' cannot be reshaped: pruning channels and keeping layers {known}"):
        family_of(config)
    with pytest.raises(UserError, match=r"axis map is missing, .*transformer\.h\.\*\.self_attention\.query_key_value\.weight") as told:
        family_of(AutoModelForCausalLM.from_config(config))
    assert known in str(told.value)
    # each kind of tensor once, not once per layer
    assert str(told.value).count("query_key_value.weight") == 1


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "phimoe"])
def test_a_mixture_of_experts_is_refused_by_name(kind: str) -> None:
    with pytest.raises(UserError, match=f"model_type '{kind}' cannot be reshaped: it is a mixture of experts, whose router and experts"):
        family_of(AutoConfig.for_model(kind))
    assert "mixture of experts" in no_map(AutoConfig.for_model(kind))
