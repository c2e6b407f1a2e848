"""`logger: wandb` without a key: a real offline run, read back from its own file."""

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_offline_run_holds_config_curves_table_and_pictures(tiny: dict[str, Any], run: Any, read_wandb: Any, tmp_path: Path) -> None:
    tiny["stages"] = [{"distill": {"steps": 3}}]
    tiny["trainer"]["evaluate_every"] = 1
    done = run({**tiny, "logger": "wandb"}, WANDB_MODE="offline")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "offline" in done.stdout
    assert not (tmp_path / "wandb").exists()
    folder = tmp_path / "runs/tiny"
    identifier = (folder / "wandb-run-id.txt").read_text().strip()
    (part,) = read_wandb(folder)
    assert part["id"] == identifier
    assert part["config"]["data"]["seq_length"] == 32
    curves = [line["train/loss"] for line in part["history"] if "train/loss" in line]
    assert len(curves) == 3
    groups = {"train/learning_rate", "train/data_epochs", "heldout/perplexity", "speed/tokens_per_second", "memory/peak_gb"}
    assert groups <= {key for line in part["history"] for key in line}
    (artifact,) = (artifact for artifact in part["artifacts"] if artifact[1] == "report")
    assert artifact == (f"report-{identifier}", "report", ["recipe.yaml", "report.html", "report.json", "report.md"])
    logged = {key.split(".")[0] for line in part["history"] for key in line}
    assert {"stages", "size-quality", "curves"} <= logged
    assert part["summary"]["final/parameters"] > 0
    report = json.loads((folder / "report.json").read_text())
    rows = {row["name"]: row for row in report["stages"]}
    for name in ("teacher", "00-student", "01-distill"):
        assert part["summary"][f"{name}/final_perplexity"] == rows[name]["eval"]["perplexity"]
        assert part["summary"][f"{name}/final_size_bytes"] == rows[name]["bytes"]
    assert part["summary"]["01-distill/final_tokens"] == rows["01-distill"]["tokens"]
    watched = [line for line in part["history"] if "heldout/kl" in line]
    assert [line["tokens"] for line in watched] == [0, 512, 1024, 1536]
    assert (part["axes"]["train/*"], part["axes"]["speed/*"]) == ("tokens", "step")
    (file,) = folder.glob("wandb/offline-run-*/files/media/table/stages*.json")
    table = json.loads(file.read_text())
    places = {heading: place for place, heading in enumerate(table["columns"])}
    assert [line[places["perplexity"]] for line in table["data"]] == [row["eval"]["perplexity"] for row in rows.values()]

    again = run({**tiny, "logger": "wandb"}, "stages.0.steps=4", WANDB_MODE="offline")
    assert again.returncode == 0, again.stderr
    assert {part["id"] for part in read_wandb(folder)} == {identifier}
