"""An answer is what a plain loop over the logits gives; limits, seeds and Ctrl-C."""

from pathlib import Path

import pytest
import torch

from decoct.launch.answers.answer import Sampling, answer, prompt_ids
from decoct.launch.answers.opened import Opened, open_for_answers
from decoct.models.common.errors import UserError
from decoct.models.generation import end_ids

from .conftest import make_model


def by_hand(opened: Opened, ids: list[int], count: int) -> list[int]:
    """Greedy, without a cache, one forward pass over everything for each token."""
    made: list[int] = []
    for _ in range(count):
        logits = opened.model(torch.tensor([ids + made])).logits[0, -1, : opened.v_eff]
        made.append(int(logits.argmax()))
        if made[-1] in end_ids(opened.model, opened.tokenizer):
            return made[:-1]
    return made


def test_greedy_takes_the_likeliest_token_each_time(opened: Opened) -> None:
    ids = prompt_ids(opened, "the cat")
    heard: list[str] = []
    made = answer(opened, ids, Sampling(max_tokens=20), say=heard.append)
    assert made.ids == by_hand(opened, ids, 20)
    assert "".join(heard) == made.text
    assert made.text == opened.tokenizer.decode(made.ids, skip_special_tokens=True)
    assert made.prompt_tokens == len(ids)


def test_settings_of_the_model_do_not_change_the_answer(opened: Opened) -> None:
    ids = prompt_ids(opened, "the cat")
    plain = answer(opened, ids, Sampling(max_tokens=12))
    settings = opened.model.generation_config
    settings.do_sample, settings.temperature, settings.repetition_penalty, settings.max_length = True, 9.0, 5.0, 3
    assert answer(opened, ids, Sampling(max_tokens=12)).ids == plain.ids
    assert opened.model.generation_config is settings, "they are the model's own again afterwards"


def test_the_seed_decides_what_is_sampled_and_leaves_the_generator_alone(opened: Opened) -> None:
    ids = prompt_ids(opened, "the cat")
    state = torch.get_rng_state()
    one, same, other = (answer(opened, ids, Sampling(max_tokens=12, temperature=5.0, seed=seed)).ids for seed in (1, 1, 2))
    assert one == same != other
    assert torch.equal(state, torch.get_rng_state())


def test_a_small_top_p_is_greedy(opened: Opened) -> None:
    ids = prompt_ids(opened, "the cat")
    sampled = answer(opened, ids, Sampling(max_tokens=12, temperature=1.0, top_p=1e-6))
    assert sampled.ids == answer(opened, ids, Sampling(max_tokens=12)).ids


def test_rows_of_a_padded_head_are_never_said(tmp_path: Path) -> None:
    opened = open_for_answers(str(make_model(tmp_path / "padded", rows=4000)))
    made = answer(opened, prompt_ids(opened, "the cat"), Sampling(max_tokens=30, temperature=50.0))
    assert made.ids
    assert max(made.ids) < opened.v_eff < opened.model.config.vocab_size


def test_an_answer_ends_at_its_end_token_at_the_limit_and_at_the_context(opened: Opened) -> None:
    ids = prompt_ids(opened, "the cat")
    greedy = by_hand(opened, ids, 8)
    assert answer(opened, ids, Sampling(max_tokens=4)).finish == "max_tokens"
    # a token that comes up is made an end token
    at = next(n for n in range(1, 8) if greedy[n] not in greedy[:n])
    ended = answer(opened, ids, Sampling(max_tokens=8), stops=[greedy[at]])
    assert (ended.finish, ended.ids) == ("end", greedy[:at])
    assert "ended by itself" in ended.words()
    assert opened.context is not None
    long = (ids * 100)[: opened.context - 3]
    full = answer(opened, long, Sampling(max_tokens=8))
    assert len(full.ids) <= 3
    assert full.finish in ("context", "end")


def test_a_prompt_without_room_is_refused(opened: Opened) -> None:
    with pytest.raises(UserError, match=r"the prompt has 96 tokens, and the context of tiny has 96, which prompt and answer share"):
        answer(opened, [5] * 96, Sampling())
    for empty in ("", " \n"):
        with pytest.raises(UserError, match="the prompt is empty"):
            prompt_ids(opened, empty)


def test_ctrl_c_keeps_what_was_said(opened: Opened) -> None:
    heard: list[str] = []

    def say(text: str) -> None:
        heard.append(text)
        if len(heard) == 3:
            raise KeyboardInterrupt

    ids = prompt_ids(opened, "the cat")
    made = answer(opened, ids, Sampling(max_tokens=20), say=say)
    assert made.finish == "interrupted"
    assert made.text == "".join(heard)
    assert made.ids == by_hand(opened, ids, 20)[: len(made.ids)]
    assert answer(opened, ids, Sampling(max_tokens=6)).ids == by_hand(opened, ids, 6), "the model is as before"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_tokens": 0}, "--max-tokens=0 must be at least 1"),
        ({"temperature": -1.0}, "--temperature=-1.0 must be between 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p=0.0 must be above 0"),
        ({"top_p": 0.5}, "--top-p=0.5 has no effect without sampling"),
        ({"seed": -1}, "--seed=-1 must be"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Sampling(**settings)  # pyright: ignore[reportArgumentType] - that is the point
