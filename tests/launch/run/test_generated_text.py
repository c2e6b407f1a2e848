"""A run without text of its own: its teacher writes it, once, and every stage reads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..conftest import Run


def test_the_teacher_writes_the_text_of_a_run(run: Run, small_student: Path, read_report: Callable[..., dict[str, Any]]) -> None:
    recipe = {
        "name": "tiny",
        "teacher": {"path": str(small_student), "load_in": "fp32"},
        "student": {"path": str(small_student)},
        "data": {"generate": {"tokens": "3k", "document_tokens": 64}, "seq_length": 32, "eval_tokens": 512},
        "stages": [
            {"quantize": {"method": "gptq", "calibration_tokens": 1024, "weights": {"group_size": 16}}},
            {"qat": {"steps": 2, "weights": {"group_size": 16}}},
        ],
        "trainer": {"precision": "32", "global_batch_tokens": 512},
    }
    done = run(recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "model writes 3,000 tokens of text" in " ".join(done.stderr.split())
    first = read_report()
    assert "tokens that model wrote" in first["protocol"]["text"]
    again = run(recipe)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "tokens of text" not in again.stderr
    assert read_report()["protocol"]["text_hash"] == first["protocol"]["text_hash"]
    assert again.stdout.count("skipped") + again.stdout.count("is done") >= 1, again.stdout
