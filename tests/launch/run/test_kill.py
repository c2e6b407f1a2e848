"""Kill -9 inside each training stage, twice, and run again: the same bits as a run that was never killed."""

import hashlib
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ...support.warm_python import WarmProcess, WarmPython

Start = Callable[[Path], WarmProcess]

pytestmark = pytest.mark.slow

TRAINING = ("01-distill", "02-prune", "03-qat")


def recipe(tiny: dict[str, Any], name: str) -> dict[str, Any]:
    stages = [
        # the best weights, and a patience that runs out in no start: both are decided from what the checkpoints hold
        {"distill": {"steps": 60, "checkpoint_every": 5, "result": "best", "early_stopping": {"patience": 7}}},
        {"prune": {"magnitude": {"keep": 0.6, "update_every": 3}, "steps": 60, "checkpoint_every": 5}},
        {"qat": {"steps": 60, "checkpoint_every": 5, "weights": {"group_size": 16}, "result": "best"}},
    ]
    return {**tiny, "name": name, "stages": stages}


def steps_done(folder: Path, stage: str) -> int:
    saves = sorted((folder / stage / "checkpoints").glob("step-*"))
    return int(saves[-1].name.removeprefix("step-")) if saves else 0


@pytest.fixture
def start(warm: WarmPython, tmp_path: Path) -> Start:
    """``start(file)``: `decoct run` in a process of its own, in ``tmp_path``."""
    return lambda file: warm.start(["-m", "decoct.launch.cli", "run", str(file)], cwd=tmp_path, merged=True)


def kill_in(process: WarmProcess, folder: Path, stage: str, after: int) -> None:
    """SIGKILL once the stage has a checkpoint of step ``after`` or later."""
    until = time.monotonic() + 240
    while steps_done(folder, stage) < after:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, f"{stage} never came to step {after}"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def fingerprint(folder: Path) -> dict[str, Any]:
    files = {f"{s}/{n}": folder / s / "model" / n for s in TRAINING for n in ("model.safetensors", "quant/codes.safetensors")}
    hashes = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.exists()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = ("step", "loss", "held_out_kl", "held_out_perplexity")
    decided = [json.loads((folder / stage / "stage.json").read_text())["held_out"] for stage in TRAINING]
    losses = [(line["stage"], *map(line.get, figures)) for line in lines if line["stage"] in TRAINING]
    return {"files": hashes, "losses": losses, "decided": decided}


def test_killed_twice_in_each_stage_ends_in_the_same_bits(tiny: dict[str, Any], start: Start, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe(tiny, name), sort_keys=False))
    whole = start(tmp_path / "whole.yaml")
    output = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, output
    killed = tmp_path / "runs" / "killed"
    for stage in TRAINING:
        for after in (10, 30):
            kill_in(start(tmp_path / "killed.yaml"), killed, stage, after)
            assert not (killed / stage / "model").exists()
    last = start(tmp_path / "killed.yaml")
    output = last.communicate(timeout=300)[0]
    assert last.returncode == 0, output
    assert "continues from the checkpoint of step" in output
    expected, seen = fingerprint(tmp_path / "runs" / "whole"), fingerprint(killed)
    assert len(expected["files"]) == 4
    assert seen == expected
    assert not list(killed.rglob("*.tmp"))
