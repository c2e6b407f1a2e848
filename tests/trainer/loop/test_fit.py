"""A stage's training as a whole, in this process: resuming, finished stages, damage, refusals."""

import io
import json
import shutil
import signal
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from decoct.models.common.errors import UserError

from ...support.warm_python import WarmPython


def _console() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=200), out


def _steps(work: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (work / "metrics.jsonl").read_text().splitlines()]


def _checkpoints(work: Path) -> list[str]:
    return sorted(path.name for path in (work / "stage/checkpoints").iterdir())


def _same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_a_stage_trains_to_its_last_step(training: ModuleType, tmp_path: Path) -> None:
    case = training.Case(steps=12, every=5, rate=1e-2, kind="pretrain")
    result, student = training.run_case(case, tmp_path, windows=training.RandomWindows(8))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3, "eight windows again and again are learnt"
    windows = training.RandomWindows(8)
    real = sum(int(windows[i]["attention_mask"].sum()) for i in range(8))
    assert (result.steps, result.tokens, result.resumed_from) == (12, 12 * real, None)
    assert rows[-1]["tokens"] == result.tokens
    assert result.metrics["loss"] == rows[-1]["loss"]
    assert not _same(student, case.student())
    assert _checkpoints(tmp_path) == ["step-00000010", "step-00000012"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "stage"], "Lightning leaves nothing of its own"
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("kind", ["distill", "prune", "movement", "sparse", "qat"])
def test_a_finished_stage_gives_its_result_at_once(training: ModuleType, tmp_path: Path, kind: str) -> None:
    case = training.Case(kind=kind, steps=6)
    first, student = training.run_case(case, tmp_path)
    console, out = _console()
    before = (tmp_path / "metrics.jsonl").read_text()
    again, other = training.run_case(case, tmp_path, console=console)
    assert _same(student, other)
    assert (again.steps, again.tokens, again.resumed_from) == (6, first.tokens, 6)
    assert again.seconds <= first.seconds
    assert "all 6 steps are done" in out.getvalue()
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert not other.training


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(training: ModuleType, tmp_path: Path) -> None:
    case = training.Case(steps=9, every=3)
    straight, student = training.run_case(case, tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "hurt")
    newest = tmp_path / "hurt/stage/checkpoints/step-00000009/student-0.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 16
    newest.write_bytes(data)
    console, out = _console()
    result, other = training.run_case(case, tmp_path / "hurt", console=console)
    assert "step-00000009 is damaged (the content of student-0.safetensors is not what was written" in out.getvalue()
    assert "continues from the checkpoint of step 6 of 9" in out.getvalue()
    assert result.resumed_from == 6
    assert _same(student, other)
    assert _steps(tmp_path / "hurt") == list(range(1, 10))
    assert _checkpoints(tmp_path / "hurt") == ["step-00000006", "step-00000009"]
    assert result.tokens == straight.tokens


def test_without_any_whole_checkpoint_the_stage_starts_again_and_says_so(training: ModuleType, tmp_path: Path) -> None:
    case = training.Case(steps=4, every=2)
    _, student = training.run_case(case, tmp_path)
    for path in (tmp_path / "stage/checkpoints").iterdir():
        (path / "state.json").unlink()
    console, out = _console()
    result, other = training.run_case(case, tmp_path, console=console)
    assert out.getvalue().count("is damaged") == 2
    assert "all checkpoints are damaged; training starts again" in out.getvalue()
    assert result.resumed_from is None
    assert _same(student, other)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 8}, "total_steps 6 -> 8"),
        ({"windows": 4}, "global_windows 8 -> 4"),
        ({"seed": 4}, "seed 3 -> 4"),
        ({"rate": 1e-3}, "learning_rate 0.003 -> 0.001"),
    ],
)
def test_checkpoints_of_another_plan_are_refused_and_left_alone(
    training: ModuleType, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    from dataclasses import replace

    case = training.Case(steps=6, every=3)
    training.run_case(case, tmp_path)
    with pytest.raises(UserError, match="another training plan") as caught:
        training.run_case(replace(case, **change), tmp_path)
    assert named in str(caught.value)
    assert _checkpoints(tmp_path) == ["step-00000003", "step-00000006"]
    assert _steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_how_fast_and_where_it_runs_is_not_part_of_the_plan(training: ModuleType) -> None:
    from dataclasses import replace

    case = training.Case()
    assert replace(case, micro=2, every=7).plan().identity() == case.plan().identity()
    assert json.loads(json.dumps(case.plan().identity())) == case.plan().identity(), "comparable after a round trip through JSON"


def test_hooks_of_another_kind_are_refused(training: ModuleType, tmp_path: Path) -> None:
    case = training.Case(kind="prune", steps=4)
    training.run_case(case, tmp_path)
    with pytest.raises(UserError, match="other hooks"):
        training.run_case(case, tmp_path, hooks=[])


def test_a_pruning_stage_ends_at_its_target(training: ModuleType, tmp_path: Path) -> None:
    from decoct.models.families import decoder_linears

    _, student = training.run_case(training.Case(kind="prune", steps=8), tmp_path)
    for name, linear in decoder_linears(student).items():
        assert int(linear.weight.count_nonzero()) == round(0.4 * linear.weight.numel()), name


def test_a_save_that_fails_is_told_and_training_goes_on(training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import decoct.trainer.checkpoints.write as checkpoint_writing

    def full_at_six(path: Path, needed: int, what: str) -> None:
        if "step-00000006" in what:
            raise UserError(f"{what} needs {needed} bytes, but 12 bytes are free")

    monkeypatch.setattr(checkpoint_writing, "check_free_space", full_at_six)
    console, out = _console()
    result, _ = training.run_case(training.Case(steps=9, every=3), tmp_path, console=console)
    assert result.steps == 9
    assert "the checkpoint of step 6 could not be written (checkpoint step-00000006 needs" in out.getvalue()
    assert _checkpoints(tmp_path) == ["step-00000003", "step-00000009"]


def test_a_last_save_that_fails_ends_the_stage_with_the_remedy(
    training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import decoct.trainer.checkpoints.write as checkpoint_writing

    def full_at_nine(path: Path, needed: int, what: str) -> None:
        if "step-00000009" in what:
            raise UserError(f"{what} needs {needed} bytes, but 12 bytes are free")

    case = training.Case(steps=9, every=3)
    monkeypatch.setattr(checkpoint_writing, "check_free_space", full_at_nine)
    with pytest.raises(UserError, match=r"step 9 could not be written.*the newest is of step 6.*Make room"):
        training.run_case(case, tmp_path)
    monkeypatch.undo()
    result, _ = training.run_case(case, tmp_path)
    assert result.resumed_from == 6


def test_lightning_says_nothing_of_its_own(training: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    console, out = _console()
    training.run_case(training.Case(steps=3), tmp_path, console=console)
    shown = capfd.readouterr()
    assert shown.out + shown.err == ""
    assert "step 3/3 (100%)" in out.getvalue()


def test_deterministic_algorithms_end_with_the_stage(training: ModuleType, tmp_path: Path) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    training.run_case(training.Case(steps=1), tmp_path)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_leaves(
    warm: WarmPython, training_command: list[str], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    options = [str(tmp_path), "distill", "steps=400", "every=1000", "pause=0.02"]
    process = warm.start([*training_command, *options])
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while (not metrics.exists() or len(metrics.read_text().splitlines()) < 5) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    # Python itself turns an uncaught KeyboardInterrupt into death by SIGINT
    assert process.returncode in (code, -number), err
    assert "stopped after step" in out
    stopped = int(out.split("stopped after step ")[1].split(";")[0])
    assert 5 <= stopped < 400
    assert _checkpoints(tmp_path) == [f"step-{stopped:08d}"]
    assert _steps(tmp_path)[-1] == stopped
