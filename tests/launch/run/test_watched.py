"""`result: best` and `early_stopping` from a recipe: what the stage's record, its model folder, the console and the report say."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_a_stage_ends_early_with_its_best_weights(tiny: dict[str, Any], run: Any, tmp_path: Path) -> None:
    # a rate at which the student forgets what it has learned
    stage = {"steps": 40, "learning_rate": 0.3, "schedule": "constant", "result": "best", "early_stopping": {"patience": 3}}
    tiny["stages"] = [{"distill": stage}, {"evaluate": {"samples": 0}}]
    tiny["trainer"]["evaluate_every"] = 2
    done = run(tiny)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs/tiny"
    seen = json.loads((folder / "01-distill/stage.json").read_text())["held_out"]
    assert seen["ended_early"]
    assert seen["last_step"] == seen["best_step"] + 6 < 40
    assert seen["model_step"] == seen["best_step"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    watched = {line["step"]: line["held_out_kl"] for line in lines if line["stage"] == "01-distill" and line.get("held_out_kl")}
    assert seen["best"] == watched[seen["best_step"]] == min(kl for step, kl in watched.items() if step > 8)
    assert "ends with the weights of the lowest held-out KL (result: best); ends early after 3 evaluations" in done.stdout
    assert f"01-distill ends early, after step {seen['last_step']} of 40" in done.stdout
    report = (folder / "report.md").read_text()
    assert f"- 01-distill ended early, after step {seen['last_step']} of 40: 3 evaluations in a row were not better" in report
    assert f"01-distill: held-out KL was lowest after step {seen['best_step']}" in report
    assert "(result: best)" in (folder / "report.html").read_text()
    assert not list((folder / "01-distill/checkpoints").glob("step-*"))
    # the figures of the folder are nearer to the best evaluation than to the last one, on all of the held-out text
    row = next(row for row in json.loads((folder / "report.json").read_text())["stages"] if row["name"] == "01-distill")
    assert abs(row["eval"]["kl"] - seen["best"]) < abs(row["eval"]["kl"] - seen["last"])

    # settings of before: another key, so the stage runs again, and the old folder stays
    del stage["result"], stage["early_stopping"]
    shutil.rmtree(folder / "01-distill")
    again = run(tiny)
    assert again.returncode == 0, again.stdout + again.stderr
    whole = json.loads((folder / "01-distill/stage.json").read_text())["held_out"]
    assert (whole["last_step"], whole["model_step"], whole["ended_early"]) == (40, 40, False)
    if whole["best_step"] != 40:
        assert "result: best would take the best" in again.stdout
