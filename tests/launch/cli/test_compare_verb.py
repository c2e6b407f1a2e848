"""`decoct compare` on the command line."""

import json
from pathlib import Path

import pytest

from decoct.launch.cli.app import app
from decoct.models.common.errors import UserError


def test_a_table_json_and_a_page_of_all_of_the_text(small_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("kado logu mita nufi. " * 60)
    start = small_student.parent.parent / "00-student/model"
    arguments = ["compare", str(start), str(small_student), "--text", str(tmp_path / "short.txt"), "--seq-length", "32", "--tasks", "cloze"]
    app([*arguments, "--html", str(tmp_path / "page.html")], standalone_mode=False)
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "01-distill/model" in shown.out
    assert "cloze" in shown.out
    assert "<svg" in (tmp_path / "page.html").read_text()
    app([*arguments, "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["models"][1]["eval"]["kl"] > 0
    assert found["models"][1]["tasks"]["cloze"]["items"] > 0
    assert found["protocol"]["text"] == "short.txt"
    with pytest.raises(UserError, match="is no file that can be written"):
        app([*arguments, "--html", str(tmp_path / "nowhere/page.html")], standalone_mode=False)
