"""What ends a text, which ids are tokens, and whose settings count."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from decoct.models.generation import control_token_of, end_ids, left_padded, only_these_settings, real_tokens, up_to_end
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["a b c"] * 4, 258)


@pytest.mark.parametrize(("named", "expected"), [(None, {257}), (7, {7, 257}), ([7, 9], {7, 9, 257})])
def test_a_text_ends_by_the_tokenizer_or_by_the_models_settings(named: Any, expected: set[int], tokenizer: Any) -> None:
    fake = SimpleNamespace(eos_token_id=257)
    model: Any = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=named))
    assert end_ids(model, fake, [3]) == sorted({*expected, 3})  # pyright: ignore[reportArgumentType]
    assert end_ids(SimpleNamespace(generation_config=None), tokenizer) == [tokenizer.eos_token_id]  # pyright: ignore[reportArgumentType]


def test_ids_are_cut_before_the_first_end() -> None:
    assert up_to_end([5, 6, 2, 7, 3], [3, 2]) == ([5, 6], True)
    assert up_to_end([2], [2]) == ([], True)
    assert up_to_end([5, 6], [2]) == ([5, 6], False)
    assert up_to_end([], [2]) == ([], False)


def test_only_a_control_token_behind_a_message_ends_it(tokenizer: PreTrainedTokenizerBase) -> None:
    end = tokenizer.eos_token
    assert control_token_of(tokenizer, f"\n{end}\nmore") == tokenizer.eos_token_id
    assert control_token_of(tokenizer, " a b") is None
    assert control_token_of(tokenizer, " \n") is None


def test_prompts_end_at_the_same_place() -> None:
    ids, mask = left_padded([[4, 5], [6], [7, 8, 9]], 1, "cpu")
    assert ids.tolist() == [[1, 4, 5], [1, 1, 6], [7, 8, 9]]
    assert mask.tolist() == [[0, 1, 1], [0, 0, 1], [1, 1, 1]]


def test_the_models_own_settings_come_back_and_do_not_count_inside(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    own = model.generation_config = GenerationConfig(repetition_penalty=50.0, eos_token_id=3, pad_token_id=0)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=6, pad_token_id=0)
    prompt = torch.tensor([[1, 2]])
    with only_these_settings(model, greedy), torch.no_grad():
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy)[0].tolist()
    assert model.generation_config is own
    ids = [1, 2]
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert made == ids


def test_rows_of_a_padded_head_are_never_chosen() -> None:
    keep: Any = real_tokens(2)
    assert keep(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[1.0, 2.0, 9.0]])).argmax() == 1
