"""Prompts of samples: beginnings of documents or of parts of a window, and what stands before an answer."""

from typing import Any

import numpy as np
import pytest

from decoct.models.common.errors import UserError
from decoct.trainer.data.prompts import answer_end, check_ends, prompts_of
from decoct.trainer.data.windows import Windows
from decoct.trainer.settings_samples import SamplesSettings

END = 0


def _window(ids: list[int], starts: list[int] | None = None, length: int | None = None) -> dict[str, Any]:
    rows = np.array([ids], dtype="<i4")
    lengths = None if length is None else np.array([length], dtype="<i4")
    return Windows(rows, lengths, None if starts is None else np.array(starts, dtype="<i8"))[0]


def _settings(prompts: int = 3, fresh: int = 2, **given: Any) -> SamplesSettings:
    return SamplesSettings(prompts=prompts, max_new_tokens=fresh, **given)


def test_a_packed_window_has_a_prompt_for_each_part() -> None:
    ids = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]
    # two samples of 3 + 2 tokens: parts of 5; the last token belongs to none
    assert prompts_of(_window(ids, []), _settings(), {END}, chat=False) == [[10, 11, 12], [15, 16, 17]]
    assert prompts_of(_window(ids, []), _settings(8, 3), {END}, chat=False) == [ids[:8]]


def test_a_document_that_begins_in_a_part_is_preferred_and_no_prompt_ends_with_an_end() -> None:
    ids = [10, 11, 12, 13, 14, 15, END, 17, 18, 19]
    assert prompts_of(_window(ids, [7]), _settings(), {END}, chat=False) == [[10, 11, 12], [17, 18, 19]]
    # the second document is two tokens and its end: it is continued before the end
    ids = [10, 11, 12, END, 14, 15, END, 17, 18, 19]
    assert prompts_of(_window(ids, [4, 7]), _settings(), {END}, chat=False)[0] == [10, 11, 12]
    ids = [10, END, 12, 13, 14, 15, 16, END, 18, 19]
    assert prompts_of(_window(ids, [2, 8]), _settings(), {END}, chat=False) == [[10], [18, 19]]


def test_a_padded_window_has_one_prompt_without_padding() -> None:
    ids = [10, 11, 12, 13, 9, 9, 9, 9]
    assert prompts_of(_window(ids, length=2), _settings(), {END}, chat=False) == [[10, 11]]
    assert prompts_of(_window(ids, length=4), _settings(), {END}, chat=False) == [[10, 11, 12]]
    assert prompts_of(_window([END, END, 5, 5], length=2), _settings(2, 2), {END}, chat=False) == []


def test_conversations_are_continued_at_the_first_answer_as_far_as_there_is_room() -> None:
    # -1 - id: not learned; two conversations of three prompt tokens, and one that begins inside an answer
    first = [-11, -12, -13, 20, 21, END]
    second = [-14, -15, -16, 22, END, -17, -18, 23]
    window = _window([*first, *second], [0, 6])
    assert prompts_of(window, _settings(fresh=4), {END}, chat=True) == [[10, 11, 12], [13, 14, 15]]
    # 14 tokens of window: 3 + 8 for the first leave 3 for the second
    assert prompts_of(window, _settings(fresh=8), {END}, chat=True) == [[10, 11, 12]]
    assert prompts_of(window, _settings(fresh=12), {END}, chat=True) == []
    inside = _window([20, 21, END, *second], [3])
    assert prompts_of(inside, _settings(fresh=4), {END}, chat=True) == [[13, 14, 15]]


def test_models_without_an_end_are_refused() -> None:
    check_ends([3], "the student")
    with pytest.raises(UserError, match=r"the student has no token that ends a text .*eos_token_id.*; add one .* \(leave samples out\)"):
        check_ends([], "the student")


class _Tokenizer:
    """As much of a tokenizer as a template is taken apart with."""

    def __init__(self, template: str | None) -> None:
        self.chat_template = template
        self.added_tokens_decoder = {7: type("Token", (), {"special": True})()}

    def apply_chat_template(self, turns: list[dict[str, str]], tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"<{turn['role']}>{turn['content']}{self.chat_template}" for turn in turns)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [7 if text.startswith("|end|") else 5]}


def test_the_template_says_what_ends_an_answer() -> None:
    made: Any = _Tokenizer
    assert answer_end(made("|end|")) == 7
    assert answer_end(made(" ")) is None
    assert answer_end(made(None)) is None
