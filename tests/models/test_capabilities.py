"""What can be done with a model, seen from its modules alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.models.capabilities import capabilities, coverage_refusal, decoder_weights, future_setting, percent
from decoct.models.dimensions import dimensions

TinyModel = Callable[..., Any]
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
_MIXTRAL = {**_SIZES, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64, "n_positions": 16}
_MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4, "time_step_rank": 4}


def meta(kind: str, **fields: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))


def test_the_linears_of_a_llama_are_all_its_decoder_weights(tiny_model: TinyModel) -> None:
    found = capabilities(tiny_model("llama"))
    assert found.weights.share() == 1.0
    assert found.weights.others == {}
    assert found.weights.total == 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48), "embedding, norms and head left out"
    assert found.reasons == {}


def test_conv1d_is_no_linear_and_everything_that_needs_linears_says_so() -> None:
    found = capabilities(meta("gpt2", **_GPT2))
    assert found.weights.share() == 0
    for action in ("prune weights", "rtn", "gptq", "qat"):
        reason = found.refusal(action)
        assert reason is not None
        assert "'gpt2'" in reason
        assert "100% Conv1D layers" in reason
        assert found.partial(action) == reason, "nothing to agree to"
    # a cut goes by the axis map, which knows Conv1D
    assert found.refusal("prune channels") is None
    assert found.refusal("distil") is None


def test_experts_in_one_parameter_are_not_reached() -> None:
    weights = decoder_weights(meta("mixtral", **_MIXTRAL))
    attention, experts, router = 2 * 32 * 32 + 2 * 16 * 32, 4 * 3 * 32 * 48, 4 * 32
    assert weights.share() == pytest.approx(attention / (attention + experts + router))
    assert "experts in 3-dimensional parameters (MixtralExperts)" in weights.left()
    found = capabilities(meta("mixtral", **_MIXTRAL))
    assert "only 1" in str(found.refusal("rtn"))
    assert found.partial("rtn") is None, "the user may agree to part of it"


def test_what_is_named_to_be_left_is_not_missed(tiny_model: TinyModel) -> None:
    weights = decoder_weights(tiny_model("llama"))
    down = [name for name in weights.linears if name.endswith("down_proj")]
    others = [name for name in weights.linears if name not in down]
    assert weights.share(others) < 0.95
    assert coverage_refusal(weights, others, named=down) is None
    assert "less than 95% is refused" in str(coverage_refusal(weights, others))


def test_shared_weights_count_once(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    before = decoder_weights(model).total
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    assert decoder_weights(model).total == before - 32 * 48


def test_a_linear_outside_the_layers_is_a_decoder_weight_that_is_not_reached() -> None:
    opt = meta("opt", hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    assert decoder_weights(opt).others == {"linears outside its decoder layers": 2 * 16 * 32}


def test_layers_are_the_list_that_holds_most_where_the_config_counts_otherwise() -> None:
    # a model of decoder alone, whose config counts the layers of an encoder that is not there
    made = meta("blenderbot", d_model=32, decoder_layers=3, encoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, vocab_size=64)
    assert capabilities(made).weights.share() == 1.0
    assert dimensions(made).layers == 3


def test_sizes_of_configs_that_name_nothing_as_llama_does() -> None:
    gpt2, mamba = dimensions(meta("gpt2", **_GPT2)), dimensions(meta("mamba", **_MAMBA))
    assert (gpt2.layers, gpt2.hidden, gpt2.heads, gpt2.head_dim, gpt2.vocabulary) == (3, 32, 4, 8, 64)
    assert gpt2.ffn == 4 * 32, "the config has no number of its own"
    assert (mamba.layers, mamba.hidden, mamba.kv_heads) == (2, 32, 0)
    assert mamba.ffn == 2 * 32, "its expanded channels"
    opt = dimensions(meta("opt", hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4))
    assert (opt.ffn, opt.hidden) == (48, 32)


def test_sizes_that_differ_between_layers_are_the_largest() -> None:
    model = meta("llama", **_SIZES, num_key_value_heads=4)
    model.config = AutoConfig.for_model("llama", **_SIZES, num_key_value_heads=4, per_layer_config={1: {"intermediate_size": 96}})
    with pytest.raises(RuntimeError):
        _ = model.config.intermediate_size
    assert dimensions(model).ffn == 96


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True, "head_dim": 8}, "use_bidirectional_attention"),
        ("llama", {"is_causal": False}, "is_causal=false"),
    ],
)
def test_a_setting_that_lets_tokens_see_later_ones_is_named(kind: str, fields: dict[str, Any], words: str) -> None:
    found = capabilities(meta(kind, **{**_SIZES, "num_key_value_heads": 2, **fields}))
    assert words in str(found.refusal("distil"))
    assert words in str(found.refusal("measure"))
    assert future_setting(AutoConfig.for_model("llama")) is None


def test_a_model_without_a_head_cannot_be_measured(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    model.set_output_embeddings(nn.Identity())
    assert "LlamaForCausalLM is not made of a backbone and a linear output head" in str(capabilities(model).refusal("measure"))


def test_a_share_below_all_never_reads_as_all() -> None:
    assert [percent(share) for share in (1.0, 0.99999, 0.95, 0.0)] == ["100%", "99.9%", "95.0%", "0.0%"]
