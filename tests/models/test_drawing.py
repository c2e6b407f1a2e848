"""Texts are drawn from the model's distribution, each with random numbers of its own; those that have ended leave the batch."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.models.drawing import Drawing, drawn, drawn_texts

TINY = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**TINY, "intermediate_size": 24},
    "gemma3_text": {**TINY, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4},
    "gpt2": {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "mamba": {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
}
PROMPTS = [[3], [5, 7, 9], [4, 4], [11, 2, 30, 8, 6], [3]]
DRAWING = Drawing(ends=[0, 1], v_eff=55, max_new_tokens=24)


def _model(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mamba"])
def test_a_text_does_not_depend_on_those_beside_it(family: str) -> None:
    """Against a loop by hand: whole forward passes without a cache, one row at a time."""
    model = _model(family)
    chances = torch.rand(len(PROMPTS), 24, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for row, (prompt, (own, ended)) in enumerate(zip(PROMPTS, drawn_texts(model, PROMPTS, DRAWING, seed=7))):
        expected: list[int] = []
        for step in range(24):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + expected])).logits[0, -1, :55].double()
            token = int((torch.softmax(logits, 0).cumsum(0) > chances[row, step]).nonzero()[0, 0])
            if token in (0, 1):
                break
            expected.append(token)
        assert (own, ended) == (expected, len(expected) < 24)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_have_ended_leave_the_batch_where_the_cache_allows_it(family: str) -> None:
    model = _model(family)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    rows: list[int] = []
    texts = drawn_texts(model, PROMPTS * 4, Drawing(ends=list(range(8)), v_eff=60, max_new_tokens=24), 0, rows.append)
    lengths = [len(own) + ended for own, ended in texts]
    assert len(set(lengths)) > 3
    assert len(sizes) == len(rows) == max(lengths)
    if family == "mamba":
        # its state has a form of its own: rows stay, and what they write behind their end is cut off
        assert set(sizes) == {20}
    else:
        assert sizes[-1] < 10
    assert all(not set(own) & set(range(8)) for own, _ in texts)


def test_the_random_numbers_of_the_process_and_the_models_settings_are_left_alone() -> None:
    model = _model("llama")
    model.generation_config.repetition_penalty = 1e6
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = drawn_texts(model, PROMPTS, DRAWING, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert model.generation_config.repetition_penalty == 1e6
    assert drawn_texts(model, PROMPTS, DRAWING, seed=1) == first != drawn_texts(model, PROMPTS, DRAWING, seed=2)
    assert drawn_texts(model, [], DRAWING, seed=1) == []


def test_temperature_and_top_p_narrow_what_is_drawn() -> None:
    model = _model("llama")
    with torch.no_grad():
        likeliest = int(model(torch.tensor([[3]])).logits[0, -1, :55].argmax())
    for given in ({"temperature": 1e-3}, {"top_p": 1e-6}):
        cold = drawn_texts(model, [[3]] * 50, Drawing(ends=[], v_eff=55, max_new_tokens=1, **given), seed=0)
        assert {own[0] for own, _ in cold} == {likeliest}


def test_a_token_is_drawn_where_the_cumulated_probabilities_pass_the_chance() -> None:
    logits = torch.tensor([0.25, 0.0, 0.5, 0.25, 0.0]).log().expand(6, 5)
    chances = torch.tensor([0.0, 0.24, 0.25, 0.74, 0.76, 1 - 2**-53], dtype=torch.float64)
    # tokens without probability are never drawn, not even at the ends
    assert drawn(logits, chances).tolist() == [0, 0, 2, 2, 3, 3]
