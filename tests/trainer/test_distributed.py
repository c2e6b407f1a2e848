"""Law 1 over processes: a real torchrun with two ranks (gloo) against one process with the same global batch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def _torchrun(script: str, work: Path, *options: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, str(work), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr
    return done.stdout + done.stderr


def _alone(command: list[str], work: Path, *options: str) -> str:
    done = subprocess.run([*command, str(work), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _rows(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def _worst(one: Path, other: Path, name: str) -> float:
    pairs = list(zip(_rows(one), _rows(other), strict=True))
    return max(abs(a[name] - b[name]) / abs(a[name]) for a, b in pairs)


@pytest.mark.parametrize("kind", ["distill", "prune"])
def test_two_ranks_give_the_curve_of_one(training_command: list[str], tmp_path: Path, kind: str) -> None:
    common = [kind, "steps=20", "windows=8", "dropout=0.0", "every=100"]
    _alone(training_command, tmp_path / "one", *common, "micro=4")
    out = _torchrun(training_command[-1], tmp_path / "two", *common, "micro=2", "ranks=2")
    assert len(_rows(tmp_path / "two")) == 20
    for name in ("loss", "kl", "cross_entropy", "grad_norm"):
        assert _worst(tmp_path / "one", tmp_path / "two", name) < 1e-5, name
    assert [row["tokens"] for row in _rows(tmp_path / "one")] == [row["tokens"] for row in _rows(tmp_path / "two")]
    assert out.count("step 20/20") == 1, "rank 0 alone shows progress"
    assert {path.name for path in (tmp_path / "two/stage/checkpoints/step-00000020").glob("rng-*")} == {
        "rng-0.safetensors",
        "rng-1.safetensors",
    }


def test_two_ranks_resume_in_the_same_bits_and_one_can_take_over(training_command: list[str], tmp_path: Path) -> None:
    common = ["distill", "windows=8", "every=4"]
    script = training_command[-1]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    _torchrun(script, straight, *common, "steps=12", "micro=2", "ranks=2")
    shutil.copytree(straight, stopped)
    last = stopped / "stage/checkpoints/step-00000012"
    (last / "state.json").write_text("{}")
    out = _torchrun(script, stopped, *common, "steps=12", "micro=2", "ranks=2")
    assert out.count("step-00000012 is damaged") == 1
    assert out.count("continues from the checkpoint of step 8") == 1
    for path in (straight / "stage/checkpoints/step-00000012").glob("*.safetensors"):
        assert path.read_bytes() == (last / path.name).read_bytes(), path.name
    # another world size: same data order and batch, dropout of its own
    (last / "state.json").write_text("{}")
    out = _alone(training_command, stopped, *common, "steps=12", "micro=4")
    assert "resumed from 8" in out
    assert _worst(straight, stopped, "loss") < 0.02
    assert [row["tokens"] for row in _rows(straight)] == [row["tokens"] for row in _rows(stopped)]
