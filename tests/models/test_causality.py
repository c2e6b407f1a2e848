"""A model that sees later tokens is found by changing one, and the setting is named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.models.causality import check_causal, future_leak
from decoct.models.common.errors import UserError
from decoct.models.teachers import LocalTeacher

TinyModel = Callable[..., Any]
_MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4, "time_step_rank": 4}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("training", [True, False])
def test_causal_models_pass_and_keep_their_mode(tiny_model: TinyModel, kind: str, training: bool) -> None:
    model = tiny_model(kind).train(training)
    assert future_leak(model) < 1e-6
    check_causal(model, "it")
    assert model.training is training


def test_a_state_space_passes() -> None:
    torch.manual_seed(0)
    check_causal(AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **_MAMBA)), "it")


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, r"config\.json has use_bidirectional_attention=True"),
        ("llama", {"is_causal": False}, r"config\.json has is_causal=false"),
    ],
)
def test_the_setting_that_opens_the_future_is_named(tiny_model: TinyModel, kind: str, fields: dict[str, Any], words: str) -> None:
    model = tiny_model(kind, **fields)
    assert future_leak(model) > 0.01
    with pytest.raises(UserError, match=f"01-distill: the student, .*'{kind}'.* sees later tokens: {words}"):
        check_causal(model, "01-distill: the student")
    with pytest.raises(UserError, match="the teacher"):
        LocalTeacher(model, v_eff=128)


def test_an_encoder_is_named_as_one() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **sizes, initializer_range=0.2))
    with pytest.raises(UserError, match="is_decoder=false"):
        check_causal(model, "it")


def test_on_the_meta_device_nothing_is_seen() -> None:
    with torch.device("meta"):
        assert future_leak(AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **_MAMBA))) == 0.0


def test_a_teacher_in_bf16_whose_hidden_states_are_fp32_has_them_in_the_dtype_of_its_head() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **_MAMBA)).to(torch.bfloat16)
    assert model.base_model(input_ids=torch.ones(1, 4, dtype=torch.int64)).last_hidden_state.dtype == torch.float32
    hidden, head, _, _ = LocalTeacher(model, v_eff=64).hidden_and_head({"input_ids": torch.arange(8)[None]})
    assert hidden.dtype == head.dtype == torch.bfloat16
