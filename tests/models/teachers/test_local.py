"""The local teacher: frozen, in its own dtype, and in nobody's module tree."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from decoct.models.common.errors import UserError
from decoct.models.families import HeadTransform
from decoct.models.teachers import LocalTeacher, Teacher, load_teacher

TinyModel = Callable[..., Any]
BATCH = {"input_ids": torch.arange(20).reshape(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.int64)}


def test_hidden_times_head_are_the_logits_of_the_real_tokens(tiny_model: TinyModel) -> None:
    model = tiny_model("qwen2")
    with torch.no_grad():
        expected = model(**BATCH).logits[..., :100]
    hidden, weight, bias, transform = LocalTeacher(model, v_eff=100).hidden_and_head(BATCH)
    assert hidden.shape == (2, 10, 32)
    assert weight.shape == (100, 32)
    assert bias is None
    assert transform == HeadTransform()
    torch.testing.assert_close(hidden @ weight.T, expected)


def test_head_bias_is_sliced_and_the_logit_transform_is_handed_on() -> None:
    phi = AutoConfig.for_model(
        "phi",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    _, weight, bias, _ = LocalTeacher(AutoModelForCausalLM.from_config(phi, dtype=torch.float32), v_eff=60).hidden_and_head(BATCH)
    assert bias is not None
    assert (weight.shape[0], bias.shape[0]) == (60, 60)
    cohere = AutoConfig.for_model(
        "cohere", hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64, logit_scale=0.25,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    teacher = LocalTeacher(AutoModelForCausalLM.from_config(cohere, dtype=torch.float32), v_eff=64)
    assert teacher.hidden_and_head(BATCH)[3] == HeadTransform(logit_scale=0.25)


def test_teacher_is_frozen_deterministic_and_usable_as_a_constant_of_a_graph(tiny_model: TinyModel) -> None:
    teacher = LocalTeacher(tiny_model("llama", attention_dropout=0.5).train(), v_eff=128)
    hidden, weight, _, _ = teacher.hidden_and_head(BATCH)
    assert torch.equal(hidden, teacher.hidden_and_head(BATCH)[0])
    assert not hidden.requires_grad
    assert not weight.requires_grad
    assert not hidden.is_inference()
    student = torch.zeros_like(hidden, requires_grad=True)
    (student * (hidden @ weight.T).sum()).sum().backward()
    assert student.grad is not None


def test_teacher_keeps_its_dtype_under_autocast(tiny_model: TinyModel) -> None:
    teacher = LocalTeacher(tiny_model("llama"), v_eff=128)
    plain = teacher.hidden_and_head(BATCH)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = teacher.hidden_and_head(BATCH)[0]
    assert torch.equal(plain, under_autocast)
    assert LocalTeacher(tiny_model("llama", dtype=torch.bfloat16), v_eff=128).hidden_and_head(BATCH)[0].dtype == torch.bfloat16


def test_teacher_is_invisible_to_the_module_that_holds_it(tiny_model: TinyModel) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Linear(2, 2)
            self.teacher = LocalTeacher(tiny_model("llama"), v_eff=128)

    holder = Holder()
    assert list(holder.state_dict()) == ["student.weight", "student.bias"]
    assert len(list(holder.parameters())) == 2
    assert {type(module) for module in holder.modules()} == {Holder, nn.Linear}
    holder.train()
    assert not holder.teacher.model.training
    assert copy.deepcopy(holder).teacher is holder.teacher
    with pytest.raises(TypeError, match="never saved"):
        pickle.dumps(holder.teacher)


def test_padding_does_not_change_hidden_states(tiny_model: TinyModel) -> None:
    teacher = LocalTeacher(tiny_model("llama"), v_eff=128)
    padded = {key: torch.cat([torch.zeros(2, 3, dtype=torch.int64), value], 1) for key, value in BATCH.items()}
    # the family's positions are relative, so padding on the left must not be seen either
    torch.testing.assert_close(teacher.hidden_and_head(padded)[0][:, 3:], teacher.hidden_and_head(BATCH)[0])
    torch.testing.assert_close(teacher.hidden_and_head({"input_ids": BATCH["input_ids"]})[0], teacher.hidden_and_head(BATCH)[0])


def test_teacher_without_enough_rows_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(UserError, match="128 rows"):
        LocalTeacher(tiny_model("llama"), v_eff=129)


def test_teacher_fulfils_the_protocol_and_describes_itself(tiny_model: TinyModel) -> None:
    teacher = LocalTeacher(tiny_model("llama"), v_eff=100, name="tiny")
    assert isinstance(teacher, Teacher)
    assert teacher.to("cpu") is teacher
    for part in ("tiny", "llama", "4 layers", "hidden 32", "float32", "100 tokens"):
        assert part in teacher.describe()


def test_load_teacher_reads_folder_and_takes_the_vocabulary_from_its_tokenizer(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    words = {**{f"w{index}": index for index in range(99)}, "<end>": 99}
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), eos_token="<end>").save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), dtype=torch.bfloat16)
    assert teacher.v_eff == 100
    assert teacher.model.dtype == torch.bfloat16
    assert load_teacher(str(tmp_path), dtype=torch.float32, v_eff=90).hidden_and_head(BATCH)[1].shape == (90, 32)
    assert str(tmp_path) in teacher.describe()
