"""A user's file of questions whose answers end in a number."""

import json
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from decoct.models.common.errors import UserError
from decoct.trainer.tasks.answers import (
    MOST_TOKENS,
    UNTIL,
    check_questions,
    last_number,
    prompt_of,
    read_questions,
    score_answers,
    split_questions,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [{"question": f"What is {n} + 1?", "answer": f"{n} and one is <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"} for n in range(12)]
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


class Calculator:
    """Answers those sums whose number is even, after some talk."""

    batch = 2

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def generate_until(self, prompts: Sequence[str], until: Sequence[str], most: int) -> list[str]:
        assert (until, most) == (UNTIL, MOST_TOKENS)
        self.prompts += prompts
        numbers = [int(prompt.rpartition("What is ")[2].split()[0]) for prompt in prompts]
        return [f" 7 apples, so $1,0\n#### {n + 1}.0\n9" if n % 2 == 0 else " I do not know 3" for n in numbers]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 1,200.50 in all", "1200.5"),
        ("#### 18", "18"),
        ("5 eggs\n#### -3\nQuestion: 9", "-3"),
        ("It costs $70,000.", "70000"),
        ("none", None),
        ("12 but #### nothing", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_the_share_of_right_numbers_over_rows_that_are_no_examples(file: Path) -> None:
    model: Any = Calculator()
    score = score_answers(model, file, shots=2, seed=3)
    examples, scored = split_questions(read_questions(file), 2, None, 3)
    even = sum(int(row.question.split()[2]) % 2 == 0 for row in scored)
    assert (score.task, score.items, score.shots, score.batch, score.seed) == ("sums", 10, 2, 2, 3)
    assert score.score == even / 10
    assert score.stderr == pytest.approx((score.score * (1 - score.score) / 9) ** 0.5)
    assert not {row.question for row in examples} & {row.question for row in scored}
    assert all(prompt.startswith(prompt_of(examples, "").removesuffix("\nAnswer:").rstrip()) for prompt in model.prompts)
    assert model.prompts[0].count("####") == 2, "the examples are solved, the question is not"
    assert model.prompts[0].endswith("?\nAnswer:")


def test_the_seed_decides_and_a_limit_takes_fewer(file: Path) -> None:
    rows = read_questions(file)
    assert split_questions(rows, 2, 5, 1) == split_questions(rows, 2, 5, 1) != split_questions(rows, 2, 5, 2)
    examples, scored = split_questions(rows, 2, 5, 1)
    assert (len(examples), len(scored)) == (2, 5)
    assert not any(row in examples for row in scored)
    assert [rows.index(row) for row in scored] == sorted(rows.index(row) for row in scored)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"question": "x"}', r"a\.jsonl:1: a task's row needs the texts 'question' and 'answer'; it has question"),
        ('{"question": "x", "answer": "none"}', r"a\.jsonl:1: the answer has no number; end it with '#### NUMBER'"),
        ("{", r"a\.jsonl:1"),
        ("", "the file has no rows"),
        ('{"question": "x", "answer": "1"}', "4 solved examples leave none of its 1 rows to score; lower task_shots"),
    ],
)
def test_a_file_that_is_no_task_is_refused_with_its_row(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=said):
        check_questions(tmp_path / "a.jsonl", None)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        read_questions(tmp_path / "no.jsonl")
