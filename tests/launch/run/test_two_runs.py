"""Two runs at once: in one folder the second is refused; what both need of the cache one makes, and the other takes over when it dies."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from decoct.launch.run.run_folder import RunFolder
from decoct.models.common.errors import UserError
from decoct.models.folder.model_folder import content_hash

from ...support.warm_python import WarmProcess, WarmPython

Start = Callable[..., WarmProcess]


def until(found: Callable[[], bool], process: WarmProcess, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, "it has ended before it came so far"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(process: WarmProcess) -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    return out


@pytest.fixture
def short(tiny: dict[str, Any]) -> dict[str, Any]:
    return {**tiny, "stages": [{"distill": {"steps": 4}}]}


@pytest.fixture
def start(warm: WarmPython, tmp_path: Path) -> Iterator[Start]:
    """Start `decoct run` without waiting for it; whatever still runs at the end is killed."""
    started: list[WarmProcess] = []

    def begin(recipe: dict[str, Any], name: str, *arguments: str) -> WarmProcess:
        file = tmp_path / f"{len(started)}.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        command = ["-m", "decoct.launch.cli", "run", str(file), "--out", name, *arguments]
        environment = {**os.environ, "DECOCT_CACHE": str(tmp_path / "cache"), "PYTHONUNBUFFERED": "1"}
        started.append(warm.start(command, cwd=tmp_path, env=environment, merged=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_is_held_is_left_as_it_is(tmp_path: Path) -> None:
    one = RunFolder(tmp_path / "run").lock(print)
    RunFolder(tmp_path / "run").open("name: one\n")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"run folder .* is in use by process {os.getpid()} on "):
        RunFolder(tmp_path / "run").lock(print)
    assert contents(tmp_path) == before
    one.release()
    RunFolder(tmp_path / "run").lock(print).release()
    assert sorted(contents(tmp_path)) == ["run/recipe.yaml", "run/versions.json"]


@pytest.mark.slow
def test_a_second_run_in_one_folder_is_refused_and_changes_nothing(short: dict[str, Any], start: Start, tmp_path: Path) -> None:
    one = start(short, "run")
    until(lambda: (tmp_path / "run" / "versions.json").exists(), one)
    os.kill(one.pid, signal.SIGSTOP)
    before = contents(tmp_path / "run")
    two = start(short, "run", "stages.0.steps=9")
    out, _ = two.communicate(timeout=120)
    assert two.returncode == 2, out
    assert f"is in use by process {one.pid} on " in out
    assert "Traceback" not in out
    assert contents(tmp_path / "run") == before
    os.kill(one.pid, signal.SIGCONT)
    ended(one)
    assert not (tmp_path / "run" / ".lock").exists()
    assert "steps: 4" in (tmp_path / "run" / "recipe.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True])
def test_a_scratch_teacher_is_made_once_by_whoever_lives(dies: bool, short: dict[str, Any], start: Start, tmp_path: Path) -> None:
    one = start(short, "one")
    until(lambda: any((tmp_path / "cache" / "teachers").glob("*/checkpoints")), one)
    os.kill(one.pid, signal.SIGSTOP)
    two = start(short, "two")
    assert two.stdout is not None
    line = next(line for line in two.stdout if "waiting for it" in line)
    assert f"process {one.pid} on " in line
    assert "makes the same scratch teacher; waiting for it" in line
    os.kill(one.pid, signal.SIGKILL if dies else signal.SIGCONT)
    out = ended(two)
    assert ("teacher (trained once, then cached)" in out) == dies
    assert ("teacher found in the cache" in out) != dies
    if not dies:
        ended(one)
        assert content_hash(tmp_path / "one/01-distill/model") == content_hash(tmp_path / "two/01-distill/model")
    assert not list((tmp_path / "cache").rglob("*lock")) + list((tmp_path / "cache").rglob("*.making"))
