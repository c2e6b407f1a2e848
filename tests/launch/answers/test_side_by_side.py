"""Two answers fit the terminal, and what they share is told."""

import pytest
from rich.console import Console

from decoct.launch.answers.answer import Answer
from decoct.launch.answers.side_by_side import beside_each_other, common_words


def made(text: str, ids: list[int]) -> Answer:
    return Answer(text=text, ids=ids, prompt_tokens=2, finish="max_tokens", seconds=1.0, tokens_per_second=12.34)


@pytest.mark.parametrize("width", [30, 59, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    console = Console(width=width, color_system=None)
    answers = (made("one two three " * 20, [1] * 60), made(f"{'x' * 50} four five", [2] * 60))
    with console.capture() as captured:
        console.print(beside_each_other(("runs/first/model", "runs/second/model"), answers, width))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= width
    text = captured.get()
    assert text.count("three") == 20
    assert "12.3" in text


def test_a_model_beside_itself_has_two_names() -> None:
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(beside_each_other(("same", "same"), (made("a", [1]), made("b", [2])), 100))
    assert "same (1)" in captured.get()
    assert "same (2)" in captured.get()


@pytest.mark.parametrize(
    ("one", "other", "same", "words"),
    [
        (made("a", [1]), made("a", [1]), True, "both answers are the same"),
        (made("a b", [1, 2]), made("a c", [1, 3]), True, "the first token is the same"),
        (made("a b c", [1, 2, 3]), made("a b d", [1, 2, 4]), True, "the first 2 tokens are the same"),
        (made("a b", [1, 2]), made("a", [1]), True, "the first token is the same"),
        (made("a", [1]), made("b", [2]), True, "they differ from the first token on"),
        (made("a", [1]), made("b", [1]), False, ""),
    ],
)
def test_what_two_answers_share(one: Answer, other: Answer, same: bool, words: str) -> None:
    assert common_words((one, other), same) == words
