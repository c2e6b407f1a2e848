"""Text comes in whole characters, and what was shown is what the tokenizer makes of all tokens."""

import pytest

from decoct.launch.answers.decoded import Decoded
from decoct.launch.answers.opened import Opened


@pytest.mark.parametrize("text", ["the cat sat on the mat", "é 世界 🙂 x", "  two  spaces\n\n\tand a tab "])
def test_pieces_add_up_and_show_no_part_of_a_character(text: str, opened: Opened) -> None:
    ids = opened.tokenizer(text)["input_ids"]
    decoded = Decoded(opened.tokenizer, [])
    pieces = [decoded.add(token) for token in ids]
    assert "".join([*pieces, decoded.rest()]) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(ids) > len("🙂"), "several tokens make one character"


def test_a_character_that_is_never_completed_is_shown_at_the_end(opened: Opened) -> None:
    ids = opened.tokenizer("a 🙂")["input_ids"][:-1]
    decoded = Decoded(opened.tokenizer, [])
    said = "".join(decoded.add(token) for token in ids)
    assert said == "a "
    assert set(decoded.rest()) == {"\ufffd"}


def test_the_prompt_is_not_repeated_and_special_tokens_are_left_out(opened: Opened) -> None:
    tokenizer = opened.tokenizer
    decoded = Decoded(tokenizer, tokenizer("the cat")["input_ids"])  # pyright: ignore[reportArgumentType] - one text gives one list
    ids = [*tokenizer(" sat")["input_ids"], tokenizer.convert_tokens_to_ids("<|end|>"), *tokenizer(" on")["input_ids"]]
    assert "".join(decoded.add(token) for token in ids) + decoded.rest() == " sat on"
