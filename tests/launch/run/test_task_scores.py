"""Tasks of an evaluate stage: scored for model and teacher, stored, shown, judged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from decoct.launch.run.task_scores import _files_of

Verb = Callable[..., Any]
pytestmark = pytest.mark.slow


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    file = tmp_path / "sums.jsonl"
    file.write_text("\n".join(json.dumps({"question": f"ka {n}", "answer": f"do #### {n}"}) for n in range(8)))
    return file


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_a_model_and_its_teacher_are_scored_once_and_shown(
    verb: Verb, small_student: Path, corpus: Path, sums: Path, tmp_path: Path
) -> None:
    arguments = ["evaluate", str(small_student), "--teacher", str(small_student), "--text", str(corpus), "--tokens", "2k"]
    arguments += ["--seq-length", "64", "--tasks", f"cloze,{sums}", "--out", "out", "task_limit=5", "task_shots=2", "min_task.cloze=100%"]
    done = verb(*arguments)
    rows = report_of(tmp_path / "out")["stages"]
    assert [row["kind"] for row in rows] == ["teacher", "evaluate"]
    scores = rows[1]["tasks"]
    assert scores == rows[0]["tasks"], "the model is its own teacher"
    assert set(scores) == {"cloze", "sums"}
    assert (scores["cloze"]["items"], scores["sums"]["items"], scores["sums"]["shots"], scores["sums"]["limit"]) == (5, 5, 2, 5)
    assert "cloze: exact last word of the teacher is" in done.stdout
    assert "blocks" not in rows[1]
    assert rows[1]["eval"]["kl_se"] is not None
    for suffix in ("md", "html"):
        page = (tmp_path / "out" / f"report.{suffix}").read_text()
        assert "cloze" in page and "Task sums (sums.jsonl, sha256 " in page and "±" in page
    stored = {file: file.stat().st_mtime_ns for file in (tmp_path / "out/.measured").glob("task-*.json")}
    assert len(stored) == 2
    verb(*arguments)
    assert {file: file.stat().st_mtime_ns for file in stored} == stored


def test_a_gate_of_a_task_ends_the_run_with_exit_code_3(run: Callable[..., Any], tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["stages"] = [{"prune": {"magnitude": {"keep": 0.02}}}, {"evaluate": {"tasks": ["cloze"], "min_task": {"cloze": "10000%"}}}]
    tiny["data"] |= {"seq_length": 64, "eval_tokens": 2048}
    done = run(tiny)
    report = report_of(tmp_path / "runs/tiny")
    teacher, pruned = (next(row for row in report["stages"] if row["kind"] == kind) for kind in ("teacher", "prune"))
    assert teacher["tasks"]["cloze"]["score"] > 0
    assert pruned["tasks"]["cloze"]["items"] == teacher["tasks"]["cloze"]["items"]
    assert done.returncode == 3, done.stdout + done.stderr
    assert "task cloze: exact last word" in done.stderr and "wanted is min_task=10000%" in done.stderr


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        (["no-such.jsonl"], "task no-such.jsonl: there is no such file"),
        (["arc_easi"], "arc_easi"),
        (["cloze", "--tasks", "cloze"], "names cloze twice"),
    ],
)
def test_a_task_that_cannot_be_opened_is_one_message_before_any_work(
    verb: Verb, small_student: Path, tmp_path: Path, tasks: list[str], said: str
) -> None:
    done = verb("evaluate", str(small_student), "--tasks", *tasks, "--out", "out", code=2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_data_that_a_task_file_names_is_part_of_its_key(tmp_path: Path) -> None:
    task, data = tmp_path / "a.yaml", tmp_path / "rows.jsonl"
    data.write_text("{}")
    beside = tmp_path / "more.jsonl"
    beside.write_text("{}")
    task.write_text(f'dataset_kwargs: {{data_files: {{test: ["{data}",more.jsonl], train: {data}}}}}\nother: none.jsonl\n')
    assert _files_of(task) == [task, data, beside]
    assert _files_of(tmp_path / "b.yaml") == []
