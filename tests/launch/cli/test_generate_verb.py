"""`decoct generate`: text, JSON, two models beside each other; every mistake is one message."""

import json
from pathlib import Path
from typing import Any

import pytest

from decoct.launch.cli.app import app


@pytest.fixture
def generate(small_student: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """``generate(*arguments)``: what it writes to stdout, at most six tokens long."""

    def run(*arguments: str) -> str:
        app(["generate", str(small_student), "--max-tokens", "6", *arguments], standalone_mode=False)
        seen = capsys.readouterr()
        assert seen.err == ""
        return seen.out

    return run


def test_answers_as_text_as_json_and_from_files(generate: Any, tmp_path: Path) -> None:
    alone = generate("--prompt", "kado")
    made = json.loads(generate("--prompt", "kado", "--json"))
    assert made["answers"][0]["text"] + "\n" == alone
    assert [made["answers"][0][key] for key in ("prompt", "tokens", "finish")] == ["kado", 6, "max_tokens"]
    (tmp_path / "prompts.txt").write_text("kado\nlogu mita\n")
    assert generate("--prompts", str(tmp_path / "prompts.txt")).startswith(f"> kado\n{alone}\n> logu mita\n")


def test_another_model_is_shown_beside(generate: Any, small_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    shown = generate("--prompt", "kado", "--compare", str(small_student))
    assert "both answers are the same" in shown
    assert "01-distill/model (2)" in shown
    assert max(map(len, shown.splitlines())) <= 70
    both = json.loads(generate("--prompt", "kado", "--compare", str(small_student), "--json"))
    assert both["other"]["answers"][0]["text"] == both["answers"][0]["text"]


def test_mistakes_end_with_code_2_and_one_message(verb: Any, small_student: Path, tmp_path: Path) -> None:
    def told(*arguments: str) -> str:
        done = verb("generate", *arguments, code=2)
        assert done.stdout == ""
        assert done.stderr.count("decoct: error") == 1
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "the prompt is empty" in told(str(small_student), "--prompt", "")
    assert "is not a model folder" in told(str(tmp_path), "--prompt", "x")
    assert "prompt 2 of 2 has 3," in told(str(small_student), "--prompt", "x", "--prompt", "kado " * 3000)
    assert "has no chat template" in told(str(small_student), "--prompt", "x", "--chat")
