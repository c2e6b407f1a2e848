"""A task of a user's file: questions whose answers end in a number, as in GSM8K (Cobbe et al. 2021, arXiv 2110.14168).

Rows have ``question`` and ``answer``; the number is the last one behind ``####``, or the last of the answer. Rows drawn by the seed are
shown solved before each question, and are not scored. The model continues greedily, and the last number of what it says is compared.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from ...models.common.errors import UserError
from ...models.common.files import sha256_file
from ..data.file_rows import read_rows
from ..data.order import sample_order
from .language_model import LanguageModel
from .score import TaskScore, share_and_error

SUFFIXES = (".jsonl", ".ndjson")
SHOTS = 4
"""Solved examples when no number is given."""
MOST_TOKENS = 256
"""Tokens of an answer at most."""
UNTIL = ("\n\n", "Question:")
_MARK = "####"
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Question:
    """A row."""

    question: str
    answer: str
    number: Decimal
    """The number that is right."""


def read_questions(path: str | Path) -> list[Question]:
    """The rows of a file.

    Raises:
        UserError: the file cannot be read, or a row has no question or no answer with a number; the message names the row.
    """
    if not Path(path).is_file():
        raise UserError(f"task {path}: there is no such file; give a file of JSON lines with 'question' and 'answer'")
    found = []
    for where, row in read_rows(Path(path)):
        if isinstance(row, UserError):
            raise row
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise UserError(
                f"{where}: a task's row needs the texts 'question' and 'answer'; it has {', '.join(map(str, row)) or 'nothing'}"
            )
        number = last_number(answer)
        if number is None:
            raise UserError(f"{where}: the answer has no number; end it with '{_MARK} NUMBER'")
        found.append(Question(question, answer, number))
    if not found:
        raise UserError(f"task {path}: the file has no rows")
    return found


def last_number(text: str) -> Decimal | None:
    """The last number behind the first ``####``, or of the whole text without one; None if there is none. '1,200.0' is 1200."""
    said = text.partition(_MARK)[2].partition("\n")[0] if _MARK in text else text
    numbers = _NUMBER.findall(said)
    try:
        return Decimal(numbers[-1].replace(",", "")) if numbers else None
    except InvalidOperation:
        return None


def split_questions(rows: Sequence[Question], shots: int, limit: int | None, seed: int) -> tuple[list[Question], list[Question]]:
    """(examples, rows to score), drawn by the seed; rows to score are in the file's order, and none of them is an example."""
    order = sample_order(len(rows), seed, 0).tolist()
    scored = sorted(order[shots:] if limit is None else order[shots : shots + limit])
    return [rows[index] for index in order[:shots]], [rows[index] for index in scored]


def check_questions(path: str | Path, shots: int | None) -> None:
    """Raises UserError where ``score_answers`` would before it asks the model."""
    _enough(path, read_questions(path), SHOTS if shots is None else shots)


def _enough(path: str | Path, rows: Sequence[Question], shots: int) -> None:
    if len(rows) <= shots:
        raise UserError(
            f"task {path}: {shots} solved examples leave none of its {len(rows)} rows to score; lower task_shots, or give more rows"
        )


def prompt_of(examples: Sequence[Question], question: str) -> str:
    """The examples, solved, and the question."""
    solved = [f"Question: {row.question.strip()}\nAnswer: {row.answer.strip()}" for row in examples]
    return "\n\n".join([*solved, f"Question: {question.strip()}\nAnswer:"])


def score_answers(
    model: LanguageModel, path: str | Path, *, shots: int | None = None, limit: int | None = None, seed: int = 0
) -> TaskScore:
    """Share of questions that the model answers with the right number.

    Args:
        model: The model.
        path: File of JSON lines.
        shots: Solved examples before each question; None = ``SHOTS``.
        limit: Score at most this many questions, chosen by the seed; None = all that are no examples.
        seed: Seed of the choice of examples and questions.

    Raises:
        UserError: see ``read_questions``; or there are no more rows than examples.
    """
    rows, count = read_questions(path), SHOTS if shots is None else shots
    _enough(path, rows, count)
    examples, scored = split_questions(rows, count, limit, seed)
    said = model.generate_until([prompt_of(examples, row.question) for row in scored], UNTIL, MOST_TOKENS)
    score, error = share_and_error([last_number(text) == row.number for text, row in zip(said, scored)])
    return TaskScore(
        task=Path(path).stem,
        metric="exact answer",
        score=score,
        stderr=error,
        items=len(scored),
        shots=count,
        limit=limit,
        batch=model.batch,
        seed=seed,
        source=f"{Path(path).name}, sha256 {sha256_file(Path(path))[:12]}",
    )
