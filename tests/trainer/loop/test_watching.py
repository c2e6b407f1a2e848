"""`result: best` and `early_stopping` in a stage that trains: the right weights, the same after any stop, and nothing else changed."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from decoct.models.common.errors import UserError
from decoct.models.common.files import sha256_file
from decoct.trainer.checkpoints.read import open_checkpoint, step_folders
from decoct.trainer.loop import callback

TIMES = ("seconds", "tokens_per_second", "peak_memory_bytes")
# one held-out window, whose figures fall and rise again; on more of this random text they only rise
BEST = {"pretrain": 12, "prune": 18, "learned": 15}
"""Step of the lowest figure of each kind, with an evaluation every 3 of 24 steps. A prune or qat stage counts from its final form on."""


def rows(work: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def case(training: ModuleType, **more: Any) -> Any:
    return training.Case(**{"kind": "pretrain", "watch": 3, "dropout": 0.0, "every": 5, "text": 1, **more})


def steps_kept(work: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in step_folders(work / "stage/checkpoints"))


def same_weights(one: Any, other: Any) -> bool:
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("kind", BEST)
def test_the_best_weights_are_those_of_the_best_evaluation(training: ModuleType, tmp_path: Path, kind: str) -> None:
    last, best = case(training, kind=kind, every=3), case(training, kind=kind, result="best")
    straight, end = training.run_case(last, tmp_path / "last")
    chosen, student = training.run_case(best, tmp_path / "best")
    assert rows(tmp_path / "last") == rows(tmp_path / "best"), "the training is the same"
    assert chosen.held_out["best_step"] == chosen.held_out["model_step"] == BEST[kind]
    assert straight.held_out["best_step"] == BEST[kind]
    assert straight.held_out["model_step"] == 24
    assert not same_weights(student, end)
    # the student of that step, of a stage that was watched and checkpointed otherwise
    saved = open_checkpoint(tmp_path / "best/stage/checkpoints", BEST[kind]).tensors("student")
    assert all(torch.equal(tensor, student.state_dict()[name]) for name, tensor in saved.items())
    assert 24 in steps_kept(tmp_path / "best")
    assert len(steps_kept(tmp_path / "best")) <= 3
    assert steps_kept(tmp_path / "last") == [21, 24], "nothing more is kept unless asked for"


def test_masks_of_the_best_step_come_with_its_weights(training: ModuleType, tmp_path: Path) -> None:
    _, student = training.run_case(case(training, kind="prune", result="best"), tmp_path)
    from decoct.models.families import decoder_linears

    weights = torch.cat([linear.weight.flatten() for linear in decoder_linears(student).values()])
    assert (weights == 0).float().mean() == pytest.approx(0.6, abs=0.001)


@pytest.mark.parametrize("lost", [(24,), (24, 20)])
@pytest.mark.parametrize("kind", BEST)
def test_resuming_ends_in_the_same_best(training: ModuleType, tmp_path: Path, kind: str, lost: tuple[int, ...]) -> None:
    best = case(training, kind=kind, result="best", dropout=0.1)
    first, student = training.run_case(best, tmp_path)
    before = rows(tmp_path)
    for step in lost:
        shutil.rmtree(tmp_path / f"stage/checkpoints/step-{step:08d}")
    again, twin = training.run_case(best, tmp_path)
    assert again.resumed_from == (20 if lost == (24,) else first.held_out["best_step"])
    assert again.held_out == first.held_out
    assert same_weights(student, twin)
    assert rows(tmp_path) == before
    done, third = training.run_case(best, tmp_path)
    assert (done.held_out, done.resumed_from) == (first.held_out, 24), "a finished stage is only restored"
    assert same_weights(student, third)


def test_a_stage_ends_early_and_says_why(training: ModuleType, tmp_path: Path) -> None:
    out = io.StringIO()
    early = case(training, patience=2, steps=40, rate=3e-3)
    whole, _ = training.run_case(replace(early, patience=0), tmp_path / "whole")
    result, student = training.run_case(early, tmp_path / "early", console=Console(file=out, width=300))
    ended = result.held_out["best_step"] + 6
    assert result.steps == result.held_out["last_step"] == ended < 40 == whole.steps
    assert result.held_out["ended_early"]
    *_, last = rows(tmp_path / "early")
    assert (last["step"], last["ended_early"], last["evaluations_since_better"]) == (ended, 1, 2)
    told = out.getvalue()
    assert f"pretrain ends early, after step {ended} of 40: for 2 evaluations held-out loss did not fall" in told
    # until then the stage is the one that was not stopped
    more = ("ended_early", "evaluations_since_better")
    until = [{key: value for key, value in line.items() if key not in more} for line in rows(tmp_path / "early")]
    assert until == rows(tmp_path / "whole")[: len(until)]
    again, twin = training.run_case(early, tmp_path / "early")
    assert (again.resumed_from, again.steps, again.held_out) == (ended, ended, result.held_out), "it does not go on"
    assert same_weights(student, twin)
    shutil.rmtree(tmp_path / f"early/stage/checkpoints/step-{ended:08d}")
    third, twin = training.run_case(early, tmp_path / "early")
    assert third.resumed_from == ended // 5 * 5
    assert third.held_out == result.held_out, "a resumed stage comes to the same decision"
    assert same_weights(student, twin)


def test_an_early_end_with_the_best_weights(training: ModuleType, tmp_path: Path) -> None:
    result, student = training.run_case(case(training, patience=2, result="best"), tmp_path)
    seen = result.held_out
    assert (seen["best_step"], seen["model_step"], seen["last_step"], result.steps) == (12, 12, 18, 18)
    saved = open_checkpoint(tmp_path / "stage/checkpoints", 12).tensors("student")
    assert all(torch.equal(tensor, student.state_dict()[name]) for name, tensor in saved.items())


def test_patience_waits_for_the_final_form_and_the_end_of_the_warm_up(training: ModuleType, tmp_path: Path) -> None:
    # the KL of these stages only rises: without the rule they would end after their second evaluation
    for kind, counted in (("prune", 18), ("learned", 15)):
        result, _ = training.run_case(case(training, kind=kind, patience=1), tmp_path / kind)
        assert result.steps == counted + 3, kind
    result, _ = training.run_case(case(training, kind="distill", patience=1, warmup=0.5), tmp_path / "warm")
    assert result.held_out["best_step"] > 12


def test_a_checkpoint_of_before_there_was_a_standing_goes_on(training: ModuleType, tmp_path: Path) -> None:
    plain = case(training)
    first, student = training.run_case(plain, tmp_path)
    checkpoints = tmp_path / "stage/checkpoints"
    shutil.rmtree(checkpoints / "step-00000024")
    state = checkpoints / "step-00000020/state.json"
    old = {key: value for key, value in json.loads(state.read_text()).items() if key not in ("best", "standing")}
    state.write_text(json.dumps(old))
    manifest = json.loads((checkpoints / "step-00000020/manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": state.stat().st_size, "sha256": sha256_file(state)}
    (checkpoints / "step-00000020/manifest.json").write_text(json.dumps(manifest))
    again, twin = training.run_case(plain, tmp_path)
    assert again.resumed_from == 20
    assert same_weights(student, twin)
    assert again.held_out["last"] == first.held_out["last"]
    assert again.held_out["best_step"] == 21, "only what was evaluated since then is known"


def test_a_damaged_best_is_told_and_the_last_weights_are_taken(training: ModuleType, tmp_path: Path) -> None:
    out = io.StringIO()
    best = case(training, result="best")
    training.run_case(best, tmp_path)
    file = tmp_path / "stage/checkpoints/step-00000012/student-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00\x00")
    result, student = training.run_case(best, tmp_path, console=Console(file=out, width=400))
    assert result.held_out["model_step"] == 24
    assert "the checkpoint of the best step 12 is damaged (student-0.safetensors has" in out.getvalue()
    saved = open_checkpoint(tmp_path / "stage/checkpoints", 24).tensors("student")
    assert all(torch.equal(tensor, student.state_dict()[name]) for name, tensor in saved.items())


def test_a_best_that_cannot_be_saved_is_not_the_best(training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = callback.save_checkpoint

    def full(folder: Path, state: Any, *rest: Any, **more: Any) -> Path:
        if state.step == 12:
            raise UserError("the disk is full")
        return real(folder, state, *rest, **more)

    monkeypatch.setattr(callback, "save_checkpoint", full)
    out = io.StringIO()
    result, _ = training.run_case(case(training, result="best"), tmp_path, console=Console(file=out, width=300))
    assert "the checkpoint of step 12 could not be written (the disk is full)" in out.getvalue()
    assert result.held_out["best_step"] == result.held_out["model_step"] == 9


def test_every_step_has_its_memory_and_its_share_of_the_text(training: ModuleType, tmp_path: Path) -> None:
    training.run_case(case(training, steps=6, watch=0), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["data_epochs"] for line in lines] == [step * 8 / 40 for step in range(1, 7)]
    assert all(line["peak_memory_bytes"] > 50_000_000 for line in lines)
