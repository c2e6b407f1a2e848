"""Law 6: a run killed anywhere, twice, and started again ends in the same bits as one never killed."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ...support.warm_python import WarmProcess, WarmPython

Start = Callable[..., WarmProcess]

STEPS = 24


@pytest.fixture
def start(warm: WarmPython, training_command: list[str]) -> Start:
    """``start(work, kind, pause)``: the stage in a process of its own."""

    def begin(work: Path, kind: str, pause: float) -> WarmProcess:
        options = [str(work), kind, f"steps={STEPS}", "every=5", "micro=4", f"pause={pause}"]
        # the rate of a distill stage follows from its first step, which a resumed run does not see
        options += ["start=1"] if kind == "distill" else []
        return warm.start([*training_command, *options])

    return begin


def _lines(work: Path) -> list[str]:
    path = work / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def _kill_after(process: WarmProcess, work: Path, step: int) -> int:
    """SIGKILL once step ``step`` is in the metrics; returns the last step seen."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        lines = _lines(work)
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
            break
        time.sleep(0.005)
    process.kill()
    _, err = process.communicate()
    assert process.returncode == -9, f"it should have been running when it was killed: {err}"
    return json.loads(_lines(work)[-1])["step"]


def _finish(process: WarmProcess) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def _final_files(work: Path) -> dict[str, bytes]:
    folder = work / "stage/checkpoints" / f"step-{STEPS:08d}"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def _numbers(work: Path) -> list[dict[str, float]]:
    """All lines, without the fields that tell of time and memory."""
    rows = [json.loads(line) for line in _lines(work)]
    return [{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second", "peak_memory_bytes")} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distill", "features", "prune", "movement", "qat", "learned", "lattices"])
def test_killed_twice_ends_in_the_same_bits(start: Start, tmp_path: Path, kind: str) -> None:
    straight, hurt = tmp_path / "straight", tmp_path / "hurt"
    _finish(start(straight, kind, pause=0.0))
    draw = random.Random()
    first, second = draw.randint(1, 9), draw.randint(13, 21)
    killed = [_kill_after(start(hurt, kind, pause=0.04), hurt, step) for step in (first, second)]
    # The kill may hit the save of its own step, which then never was: what is committed on disk is what counts.
    newest = max(int(path.name.removeprefix("step-")) for path in (hurt / "stage/checkpoints").glob("step-*"))
    out = _finish(start(hurt, kind, pause=0.0))
    told = f"killed in or after steps {killed}"
    assert killed[1] - newest <= 5, told
    assert f"resumed from {newest}" in out, told
    assert _numbers(hurt) == _numbers(straight), told
    wanted, found = _final_files(straight), _final_files(hurt)
    assert (
        wanted.keys()
        == found.keys()
        == {
            "student-0.safetensors",
            "optimizer-0.safetensors",
            "hooks-0.safetensors",
            "rng-0.safetensors",
        }
    )
    for name in wanted:
        assert wanted[name] == found[name], f"{name} differs, {told}"


@pytest.mark.slow
def test_a_kill_during_a_save_loses_nothing(start: Start, tmp_path: Path) -> None:
    """Killed as soon as a save has begun to write, as often as it takes to finish; every start finds a whole checkpoint."""
    work = tmp_path / "work"
    folder = work / "stage/checkpoints"
    newest = 0
    for _ in range(3):
        process = start(work, "prune", pause=0.01)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            names = [path.name for path in folder.iterdir()] if folder.exists() else []
            saving = [
                int(name.split(".")[1].removeprefix("step-")) for name in names if name.startswith(".step-") and name.endswith(".tmp")
            ]
            if any(step > newest for step in saving):
                break
            time.sleep(0.0005)
        process.kill()
        process.communicate()
        whole = [int(path.name.removeprefix("step-")) for path in folder.glob("step-*")]
        newest = max(whole, default=0)
    straight = tmp_path / "straight"
    _finish(start(straight, "prune", pause=0.0))
    out = _finish(start(work, "prune", pause=0.0))
    assert "damaged" not in out
    assert _final_files(work) == _final_files(straight)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
