"""Samples in the report: where prompts come from, what is sampled once, and that nothing of it can lose a report."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from decoct.launch.run.samples import PROMPT_TOKENS, beginnings, report_samples
from decoct.models.folder.loading import load_model, load_tokenizer
from decoct.trainer.data.windows import Windows
from decoct.trainer.settings import EvaluateSettings

from ..answers.conftest import make_model

ROWS = np.arange(5 * 64, dtype=np.int32).reshape(5, 64) % 250


def test_prompts_are_from_all_over_the_text() -> None:
    found = beginnings(Windows(ROWS), 3)
    assert found == [ROWS[at, :PROMPT_TOKENS].tolist() for at in (0, 1, 3)]
    assert len(beginnings(Windows(ROWS), 9)) == 5
    assert beginnings(Windows(ROWS), 0) == []


def test_a_prompt_is_of_one_document_and_of_real_tokens() -> None:
    starts = np.array([0, 10, 64, 66, 128])
    assert [len(ids) for ids in beginnings(Windows(ROWS[:2], starts=starts), 2)] == [10], "two tokens are too few for a prompt"
    assert [len(ids) for ids in beginnings(Windows(ROWS[:1], lengths=np.array([7])), 1)] == [7]


def test_a_prompt_of_a_conversation_goes_up_to_the_answer() -> None:
    rows = ROWS[:1].copy()
    rows[0, :40] = -1 - rows[0, :40]
    assert beginnings(Windows(rows), 1) == [ROWS[0, :40].tolist()]


@pytest.fixture
def sample(tmp_path: Path) -> Callable[..., Any]:
    """``sample(**settings)``: samples of a tiny model and its teacher; ``sample.said`` are messages, ``sample.opened`` counts teachers."""
    path = make_model(tmp_path / "tiny")
    said: list[str] = []
    opened: list[int] = []
    tokenizer = load_tokenizer(path)
    run: Any = SimpleNamespace(
        data=SimpleNamespace(evaluation=Windows(ROWS)), tokenizer=tokenizer, v_eff=len(tokenizer), teacher=SimpleNamespace(content="t"),
        say=said.append, console=SimpleNamespace(status=lambda _: __import__("contextlib").nullcontext()),
    )  # fmt: skip

    def teacher() -> Any:
        opened.append(1)
        return load_model(path, dtype=torch.float32)

    def start(**settings: Any) -> Any:
        made = EvaluateSettings(sample_tokens=6, **settings)
        return report_samples(made, run, str(path), None, teacher, tmp_path / "samples.json")

    start.said, start.opened = said, opened  # pyright: ignore[reportFunctionMemberAccess] - for the tests
    return start


def test_teacher_and_model_go_on_from_each_prompt_once(sample: Any) -> None:
    found = sample(samples=2)
    assert len(found["prompts"]) == 2
    assert found["answers"]["teacher"] == found["answers"]["model"], "it is the same model"
    assert len(found["answers"]["model"]) == 2
    assert sample(samples=2) == found
    assert len(sample.opened) == 1, "the stored samples are used again"
    assert sample(samples=1) != found
    own = sample(sample_prompts=("the cat", "a dog"))
    assert own["prompts"] == ["the cat", "a dog"]
    assert sample(samples=0) is None


def test_ctrl_c_ends_the_run_and_not_the_sample_alone(sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoct.launch.run.samples.answer", lambda *_: SimpleNamespace(finish="interrupted", text=""))
    with pytest.raises(KeyboardInterrupt):
        sample()


def test_a_model_larger_than_the_memory_has_none(sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoct.launch.run.samples.available_bytes", lambda: 10)
    assert sample() is None
    assert sample.said == ["no samples: the model's files are larger than the free memory"]


def test_samples_stand_in_the_report_of_a_run_that_evaluates(verb: Any, small_student: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("kado logu mita nufi. " * 60)
    start = str(small_student.parent.parent / "00-student/model")
    arguments = ["evaluate", str(small_student), "--teacher", start, "--text", "text.txt", "--seq-length", "32", "--out", "made"]
    verb(*arguments, "samples=2", "sample_tokens=5")
    report = json.loads((tmp_path / "made/report.json").read_text())
    assert [len(texts) for texts in report["samples"]["answers"].values()] == [2, 2]
    assert "<h2>Samples</h2>" in (tmp_path / "made/report.html").read_text()
    verb(*arguments, "samples=0")
    assert json.loads((tmp_path / "made/report.json").read_text())["samples"] is None
    assert "<h2>Samples</h2>" not in (tmp_path / "made/report.html").read_text()
