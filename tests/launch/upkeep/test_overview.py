"""What is said of a run folder, in each state that it can be in."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from decoct.launch.run.outcome import forget_run_outcome, note_outcome
from decoct.launch.upkeep.overview import age, as_json, find_runs, state_of
from decoct.models.common.errors import GateFailed, UserError
from decoct.models.common.locks import Lock

Edit = Callable[[], None]


def test_a_finished_run_has_its_last_figures(finished: Path) -> None:
    run = state_of(finished)
    assert (run.state, run.recipe, run.stage, run.stages_done, run.stages) == ("finished", "tiny", "01-distill", 1, 1)
    last = json.loads((finished / "report.json").read_text())["stages"][-1]["eval"]
    assert (run.perplexity, run.kl) == (last["perplexity"], last["kl"])
    assert json.loads(json.dumps(as_json(run)))["state"] == "finished"


def unfinished(run: Path, steps: int = 1) -> None:
    """As if it had been stopped in its training stage, after ``steps`` of its steps."""
    (run / "report.json").unlink()
    (run / "01-distill/stage.json").unlink()
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("steps: 1\n", "steps: 40\n"))
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(1, steps + 1):
            figures = {"held_out_perplexity": 77.5, "held_out_kl": 0.25} if step == 2 else {}
            file.write(json.dumps({"stage": "01-distill", "step": step, **figures}) + "\n")


def test_an_unfinished_run_tells_its_step_and_the_figures_on_the_way(finished: Path) -> None:
    unfinished(finished, steps=7)
    run = state_of(finished)
    assert (run.state, run.stage, run.step, run.steps, run.stages_done) == ("stopped", "01-distill", 7, 40, 0)
    assert (run.perplexity, run.kl) == (77.5, 0.25)


def test_who_holds_the_lock_is_running(finished: Path) -> None:
    unfinished(finished)
    with Lock(finished / ".lock") as lock:
        assert lock.acquire()
        assert state_of(finished).state == "running"
        assert state_of(finished).state == "running", "looking takes nobody's lock away"
    assert state_of(finished).state == "stopped"


def test_a_failure_is_told_until_the_run_goes_on(finished: Path) -> None:
    unfinished(finished)
    note_outcome(finished, UserError("the disk is full"))
    run = state_of(finished)
    assert (run.state, run.message) == ("failed", "the disk is full")
    note_outcome(finished, KeyboardInterrupt())
    assert state_of(finished).state == "interrupted"
    forget_run_outcome(finished)
    assert state_of(finished).state == "stopped"
    note_outcome(finished, GateFailed("worse"))
    note_outcome(finished / "nowhere", UserError("x"))
    assert not (finished / "outcome.json").exists()
    assert not (finished / "nowhere").exists()


def test_a_report_of_an_earlier_start_does_not_count(finished: Path) -> None:
    later = (finished / "report.json").stat().st_mtime + 10
    os.utime(finished / "recipe.yaml", (later, later))
    assert state_of(finished).state == "stopped"


def test_a_gate_is_told_from_the_end(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    (finished / "report.json").write_text(json.dumps({**report, "gates": ["KL is 2, allowed is 1"]}))
    run = state_of(finished)
    assert (run.state, run.message) == ("stopped at a gate", "KL is 2, allowed is 1")


@pytest.mark.parametrize("file", ["recipe.yaml", "01-distill/stage.json"])
def test_a_damaged_run_is_a_line_and_no_error(file: str, finished: Path) -> None:
    (finished / file).write_text("{")
    run = state_of(finished)
    assert run.state == "damaged"
    assert run.message


def test_folders_without_runs(finished: Path, tmp_path: Path) -> None:
    assert find_runs(finished) == [finished]
    assert find_runs(tmp_path / "runs") == [finished]
    with pytest.raises(UserError, match="holds no run folders"):
        find_runs(finished / "01-distill")
    with pytest.raises(UserError, match="there is no folder"):
        find_runs(tmp_path / "nowhere")


def test_ages() -> None:
    assert [age(seconds) for seconds in (-3, 5, 61, 7200, 86_400, 200_000)] == ["0 s", "5 s", "1 min", "2 h", "1 day", "2 days"]
