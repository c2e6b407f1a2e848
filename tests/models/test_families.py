"""Any causal language model: its layers and linears, backbone and head, logit transform."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.models.common.errors import UserError
from decoct.models.families import backbone_and_head, check_head, decoder_linears, head_transform

TinyModel = Callable[..., Any]
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_decoder_linears_are_the_seven_of_each_layer_in_order(tiny_model: TinyModel, model_type: str, tied: bool) -> None:
    model = tiny_model(model_type, tie_word_embeddings=tied)
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert list(decoder_linears(model)) == [f"model.layers.{layer}.{part}" for layer in range(4) for part in parts]


def test_decoder_linears_of_an_unmapped_family_leave_out_head_and_projections_outside_the_layers() -> None:
    # OPT with another embedding width has linears (project_in, project_out) outside its layers
    config = AutoConfig.for_model(
        "opt", hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    linears = decoder_linears(AutoModelForCausalLM.from_config(config))
    assert len(linears) == 2 * 6
    assert all(name.startswith("model.decoder.layers.") for name in linears)


def test_decoder_linears_without_recognisable_layers_are_all_but_the_head(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    expected = list(decoder_linears(model))
    model.config.model_type = "something_else"
    model.config.num_hidden_layers = 77
    assert list(decoder_linears(model)) == expected


def test_subclasses_of_linear_count(tiny_model: TinyModel) -> None:
    class Special(nn.Linear):
        pass

    model = tiny_model("llama")
    model.get_submodule("model.layers.0.mlp").up_proj = Special(32, 48)
    assert isinstance(decoder_linears(model)["model.layers.0.mlp.up_proj"], Special)


@pytest.mark.parametrize("tied", [True, False])
def test_backbone_and_head_multiply_to_the_models_logits(tiny_model: TinyModel, tied: bool) -> None:
    model = tiny_model("qwen2", tie_word_embeddings=tied)
    backbone, weight, bias = backbone_and_head(model)
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.ones_like(ids)
    hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert bias is None
    assert (weight is model.get_input_embeddings().weight) is tied
    torch.testing.assert_close(hidden @ weight.T, model(input_ids=ids, attention_mask=mask).logits)


_TRANSFORMED = {
    "gemma2": {"head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 0.5},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.3},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 3.0},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"], "logits_soft_cap": 0.5},
}


@pytest.mark.parametrize("model_type", sorted(_TRANSFORMED))
def test_head_transform_is_what_the_model_does(model_type: str) -> None:
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.5}
    config = AutoConfig.for_model(model_type, **common, **ids, **_TRANSFORMED[model_type])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    backbone, weight, _ = backbone_and_head(model)
    tokens = torch.arange(8)[None]
    product = backbone(input_ids=tokens, use_cache=False).last_hidden_state @ weight.T
    expected = model(input_ids=tokens).logits
    assert (product - expected).abs().max() > 0.05
    torch.testing.assert_close(head_transform(config).apply(product), expected, rtol=1e-4, atol=1e-5)
    check_head(model)


def test_check_head_refuses_an_unknown_step_between_head_and_logits(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    check_head(model)
    model.register_forward_hook(lambda _m, _i, output: output.__class__(logits=output.logits * 1.5))
    with pytest.raises(UserError, match="LlamaForCausalLM changes its logits"):
        check_head(model)
    assert not model.training


def test_check_head_takes_tokens_that_cannot_be_said(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)).index_fill(0, torch.tensor([5]), -torch.inf))
    check_head(model)
    model.register_forward_hook(lambda _m, _i, output: output.__class__(logits=output.logits * 1.5))
    with pytest.raises(UserError, match="changes its logits"):
        check_head(model)
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(UserError, match="changes its logits"):
        check_head(model)


@pytest.mark.parametrize("training", [True, False])
def test_check_head_leaves_the_mode_as_it_was(tiny_model: TinyModel, training: bool) -> None:
    model = tiny_model("llama").train(training)
    check_head(model)
    assert model.training is training


def test_check_head_passes_other_architectures_and_the_meta_device() -> None:
    check_head(AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **_GPT2)))
    with torch.device("meta"):
        check_head(AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **_GPT2)))


def test_model_without_linear_head_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(UserError, match="LlamaModel is not made of a backbone and a linear output head"):
        backbone_and_head(tiny_model("llama").base_model)
