"""`decoct runs`, `clean`, `push` and `completion` on the command line."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from decoct.launch.cli import clean_verb, push_verb
from decoct.launch.cli.app import app
from decoct.models.common.errors import UserError
from decoct.models.common.locks import Lock


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A finished run with something to clear."""
    run = Path(shutil.copytree(made / "runs/tiny", tmp_path / "runs/tiny"))
    (run / "01-distill/checkpoints/step-1").mkdir(parents=True)
    (run / "01-distill/checkpoints/step-1/weights").write_bytes(bytes(12_000))
    return run


def decoct(*arguments: str) -> None:
    app(list(arguments), standalone_mode=False)


def test_runs_in_a_table_of_any_width_and_as_json(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent.parent)
    for width in (60, 80, 160):
        monkeypatch.setenv("COLUMNS", str(width))
        decoct("runs")
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= width
        assert "finished" in shown
    decoct("runs", "--json")
    assert json.loads(capsys.readouterr().out)[0]["path"] == "runs/tiny"


def test_clean_shows_sizes_and_removes_only_what_is_agreed(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = run / "01-distill/checkpoints"
    decoct("clean", str(run), "--dry-run")
    assert "12.00 kB" in capsys.readouterr().out
    with pytest.raises(UserError, match="--yes removes them without asking"):
        decoct("clean", str(run))
    monkeypatch.setattr(clean_verb, "agreed", lambda *_: False)
    decoct("clean", str(run))
    assert checkpoints.exists()
    with Lock(run / ".lock") as lock:
        assert lock.acquire()
        with pytest.raises(UserError, match="is in use by process"):
            decoct("clean", str(run), "--yes")
    assert checkpoints.exists()
    decoct("clean", str(run), "--yes")
    assert "freed 12.00 kB" in capsys.readouterr().out
    assert not checkpoints.exists()
    decoct("clean", str(run), "--yes")
    assert "nothing to remove" in capsys.readouterr().out
    with pytest.raises(UserError, match="name a run folder"):
        decoct("clean")


def test_push_lists_before_it_asks(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    seen: list[str | None] = [None]
    monkeypatch.setattr(push_verb, "visibility", lambda _: seen[0])
    monkeypatch.setattr(push_verb, "upload", lambda planned, **options: sent.append(options) or "https://hub/me/x")
    monkeypatch.setattr(push_verb, "agreed", lambda *_: False)
    model = str(run / "01-distill/model")
    decoct("push", model, "me/x")
    shown = capsys.readouterr().out
    assert "model.safetensors" in shown
    assert "a new private repository" in shown
    assert "nothing was uploaded" in shown
    assert not sent
    decoct("push", model, "me/x", "--public", "--yes", "--message", "one")
    assert sent == [{"private": False, "message": "one"}]
    assert "uploaded: https://hub/me/x" in capsys.readouterr().out
    seen[0] = "private"
    with pytest.raises(UserError, match="exists and is private"):
        decoct("push", model, "me/x", "--public", "--yes")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    decoct("completion", shell)
    script = capsys.readouterr().out
    assert "_DECOCT_COMPLETE=complete_" + shell in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    with pytest.raises(UserError, match="'tcsh' is not one of bash, zsh, fish"):
        decoct("completion", "tcsh")
