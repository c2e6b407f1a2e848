"""`logger: wandb` without a key: a real offline run, read back from its own file."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_offline_run_holds_config_curves_table_and_pictures(tiny: dict[str, Any], run: Any, read_wandb: Any, tmp_path: Path) -> None:
    tiny["stages"] = [{"distill": {"steps": 3}}]
    done = run({**tiny, "logger": "wandb"}, WANDB_MODE="offline")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "offline" in done.stdout
    assert not (tmp_path / "wandb").exists()
    folder = tmp_path / "runs/tiny"
    identifier = (folder / "wandb-run-id.txt").read_text().strip()
    (part,) = read_wandb(folder)
    assert part["id"] == identifier
    assert part["config"]["data"]["seq_length"] == 32
    curves = [line["01-distill/loss"] for line in part["history"] if "01-distill/loss" in line]
    assert len(curves) == 3
    logged = {key.split(".")[0] for line in part["history"] for key in line}
    assert {"stages", "size-quality", "curves"} <= logged
    assert part["summary"]["final/parameters"] > 0

    again = run({**tiny, "logger": "wandb"}, "stages.0.steps=4", WANDB_MODE="offline")
    assert again.returncode == 0, again.stderr
    assert {part["id"] for part in read_wandb(folder)} == {identifier}
