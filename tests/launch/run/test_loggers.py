"""Several loggers of one run: all of them follow it, and all of them learn how it ended."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_two_loggers_follow_a_run_that_ends_at_a_gate(tiny: dict[str, Any], run: Any, read_wandb: Any, tmp_path: Path) -> None:
    tiny["stages"] = [{"distill": {"steps": 2}}, {"evaluate": {"max_kl": 1e-9, "samples": 0}}]
    done = run({**tiny, "logger": ["csv", "wandb"]}, WANDB_MODE="offline")
    assert done.returncode == 3, done.stdout + done.stderr
    folder = tmp_path / "runs/tiny"
    (part,) = read_wandb(folder)
    assert part["exit_code"] == 3
    assert [line["train/loss"] for line in part["history"] if "train/loss" in line]
    assert part["config"]["logger"]["kind"] == ["csv", "wandb"]
    assert "train/loss" in (folder / "csv/version_0/metrics.csv").read_text()


def test_a_run_that_fails_is_a_failed_run_in_the_tracker(tiny: dict[str, Any], run: Any, read_wandb: Any, tmp_path: Path) -> None:
    # a rate at which the loss is soon no number any more
    tiny["stages"] = [{"distill": {"steps": 40, "learning_rate": 1e30, "warmup": 0}}]
    done = run({**tiny, "logger": "wandb"}, WANDB_MODE="offline")
    assert done.returncode == 1, done.stdout + done.stderr
    (part,) = read_wandb(tmp_path / "runs/tiny")
    assert part["exit_code"] == 1


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is not None, reason="mlflow is installed here")
def test_a_missing_package_ends_a_run_before_any_work(tiny: dict[str, Any], run: Any, tmp_path: Path) -> None:
    done = run({**tiny, "logger": "mlflow"})
    assert done.returncode == 2
    assert "pip install 'decoct[mlflow]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
