"""Launched jobs that are killed, stopped and started again: real processes, two ranks, gloo; warm ones but for one test."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import yaml

from decoct.models.folder.model_folder import content_hash

from ...support import warm_python
from ...support.warm_python import WarmProcess, WarmPython

pytestmark = pytest.mark.slow
STAGES = [{"distill": {"steps": 60, "checkpoint_every": 5}}]
DECOCT = ["-m", "decoct.launch.cli"]
Job = subprocess.Popen[str] | WarmProcess


class Case:
    """A recipe of one distilling stage, its folder, and the processes that were started."""

    def __init__(self, folder: Path, recipe: dict[str, Any], warm: WarmPython) -> None:
        self.folder = folder
        self.file = folder / "recipe.yaml"
        self.file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "DECOCT_CACHE": str(folder / "cache")}
        self.started: list[Job] = []
        self._warm = warm

    def start(self, arguments: list[str]) -> Job:
        """Start a warm ``python *arguments`` in a session of its own, output in a file."""
        with self._log() as log:
            self.started.append(self._warm.start(arguments, cwd=self.folder, env=self.environment, into=log, session=True))
        return self.started[-1]

    def start_cold(self, command: list[str], **environment: str) -> Job:
        """Start ``command``, as ``start``; whatever Python is among it imports everything anew."""
        with self._log() as log:
            env = {**self.environment, **environment}
            self.started.append(
                subprocess.Popen(command, cwd=self.folder, env=env, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True)
            )
        return self.started[-1]

    def _log(self) -> IO[str]:
        return (self.folder / f"log-{len(self.started)}.txt").open("w")

    def output(self, number: int = 0) -> str:
        """What the process started as ``number`` has printed."""
        return (self.folder / f"log-{number}.txt").read_text()

    def steps(self, out: str) -> int:
        """Optimizer steps that the stage has written lines of so far; that of step 0 holds held-out figures alone."""
        file = self.folder / out / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        return text.count('"01-distill"') - text.count('"01-distill", "step": 0,')

    def wait_for(self, ready: Callable[[], bool], seconds: float = 150) -> None:
        """Until ``ready()``; fails after a while, with what was printed."""
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, "\n".join(self.output(n) for n in range(len(self.started)))
            time.sleep(0.1)

    def workers(self) -> dict[int, int]:
        """rank -> process id of the workers that live now."""
        found: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                parts = [part.partition("=") for part in (entry / "environ").read_text().split("\0")]
            except (OSError, UnicodeDecodeError):
                continue
            variables = {name: value for name, _, value in parts}
            if variables.get("DECOCT_CACHE") == self.environment["DECOCT_CACHE"] and "LOCAL_RANK" in variables:
                found[int(variables["RANK"])] = int(entry.name)
        return found


@pytest.fixture
def case(tiny: dict[str, Any], made: Path, warm: WarmPython, tmp_path: Path) -> Iterator[Case]:
    tiny["stages"] = STAGES
    shutil.copytree(made / "cache/teachers", tmp_path / "cache/teachers")
    case = Case(tmp_path, tiny, warm)
    yield case
    for process in case.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def straight(made: Path, warm: WarmPython, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Content of the model that two undisturbed processes make."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = {**yaml.safe_load((made / "recipe.yaml").read_text()), "stages": STAGES}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = ["-m", "decoct.launch.cli", "run", "recipe.yaml", "trainer.devices=2", "--out", "straight"]
    done = warm.run_ranks(2, command, cwd=folder, env={**os.environ, "DECOCT_CACHE": str(made / "cache")})
    assert [rank.returncode for rank in done] == [0, 0], "".join(rank.stdout + rank.stderr for rank in done)
    assert "teacher found in the cache" in done[0].stdout
    return content_hash(folder / "straight/01-distill/model")


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_a_killed_rank_is_started_again_with_a_log_for_each_rank(case: Case, straight: str) -> None:
    job = case.start([*DECOCT, "launch", str(case.file), "--gpus", "2", "--out", "run", "--job-id", "one"])
    case.wait_for(lambda: case.steps("run") >= 12)
    os.kill(case.workers()[1], signal.SIGKILL)
    assert job.wait(timeout=200) == 0, case.output()
    assert "start 2 of 4 continues from the last checkpoint" in case.output()
    assert "continues from the checkpoint of step" in case.output()
    assert content_hash(case.folder / "run/01-distill/model") == straight
    logs = sorted(path.relative_to(case.folder / "run/logs/one").parts[0] for path in (case.folder / "run/logs/one").rglob("stdout.log"))
    assert logs == ["start-0", "start-0", "start-1", "start-1"]


@pytest.mark.parametrize("target", ["local", "torchrun"])
def test_a_mistake_is_not_tried_again(case: Case, target: str) -> None:
    options = ["--target", target, "--gpus", "2", "--out", "run", "data.files=['nowhere/*.txt']"]
    job = case.start([*DECOCT, "launch", str(case.file), *options])
    assert job.wait(timeout=100) == 2, case.output()
    assert case.output().count("error:") == 1
    assert "Traceback" not in case.output()


@pytest.mark.parametrize("target", ["local", "torchrun"])
def test_sigterm_to_the_launcher_saves_and_ends_with_143(case: Case, target: str) -> None:
    options = ["--target", target, "--gpus", "2", "--out", "run", "stages.0.steps=4000"]
    command = [*DECOCT, "launch", str(case.file), *options]
    # one start as people know it: every process imports all that it needs
    job = case.start_cold([sys.executable, *command]) if target == "local" else case.start(command)
    case.wait_for(lambda: case.steps("run") >= 7)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=40) == 143, case.output()
    saved = sorted((case.folder / "run/01-distill/checkpoints").glob("step-*"))[-1]
    assert saved.name == f"step-{case.steps('run'):08d}"
    assert "Traceback" not in case.output()
    case.wait_for(lambda: not case.workers(), 10)


def test_workers_do_not_outlive_a_killed_agent(case: Case) -> None:
    job = case.start([*DECOCT, "launch", str(case.file), "--gpus", "2", "--out", "run", "stages.0.steps=4000"])
    case.wait_for(lambda: case.steps("run") >= 3)
    assert len(case.workers()) == 2
    job.kill()
    job.wait()
    case.wait_for(lambda: not case.workers(), 10)


def test_two_nodes_one_killed_in_the_middle_end_in_the_same_bits(case: Case, straight: str) -> None:
    """Two agents on loopback, a process each; the second is killed, as when its machine goes, and started again."""
    options = ["--target", "torchrun", "--gpus", "1", "--nodes", "2", "--rdzv-endpoint", f"localhost:{_port()}", "--job-id", "pair"]
    command = [*DECOCT, "launch", str(case.file), *options, "--out", "run"]
    first = case.start([*command, "--node-rank", "0"])
    second = case.start([*command, "--node-rank", "1"])
    case.wait_for(lambda: case.steps("run") >= 12)
    second.kill()
    second.wait()
    third = case.start([*command, "--node-rank", "1"])
    assert first.wait(timeout=250) == 0, case.output(0) + case.output(2)
    assert third.wait(timeout=60) == 0, case.output(2)
    assert "continues from the checkpoint of step" in case.output(0) + case.output(2)
    assert content_hash(case.folder / "run/01-distill/model") == straight


_SRUN = """#!{python} -S
# a stand-in: lets the server of warm processes run the command "on the node", hands signals on
import signal, sys
sys.path.insert(0, {support!r})
from warm_python import WarmPython
interpreter, *arguments = [word for number, word in enumerate(sys.argv[1:], 1) if not all(w[:2] == "--" for w in sys.argv[1:number + 1])]
assert interpreter == {python!r}
process = WarmPython({place!r}).start(arguments, into=sys.stdout)
signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
sys.exit(process.wait())
"""
_SCONTROL = """#!/bin/bash
case "$1" in
  show) echo localhost;;
  requeue) echo "$2" >> "$REQUEUED";;
esac
"""


def test_the_sbatch_file_runs_saves_on_its_signal_and_is_queued_again(case: Case, straight: str, warm: WarmPython) -> None:
    srun = _SRUN.format(python=sys.executable, support=str(Path(warm_python.__file__).parent), place=warm.place())
    tools = case.folder / "bin"
    tools.mkdir()
    for name, text in (("srun", srun), ("scontrol", _SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    options = ["--target", "slurm", "--gpus", "2", "--out", "run", "--print"]
    made = warm.run([*DECOCT, "launch", str(case.file), *options], cwd=case.folder, env=case.environment)
    assert made.returncode == 0, made.stderr
    file = case.folder / "job.sbatch"
    file.write_text(made.stdout.replace(":29500", f":{_port()}"))
    slurm = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "localhost",
        "REQUEUED": str(case.folder / "requeued"),
    }
    job = case.start_cold(["bash", str(file)], **slurm)
    case.wait_for(lambda: case.steps("run") >= 12)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=90) == 0, case.output()
    assert (case.folder / "requeued").read_text() == "77\n"
    again = case.start_cold(["bash", str(file)], **slurm)
    assert again.wait(timeout=200) == 0, case.output(1)
    assert "continues from the checkpoint of step" in case.output(1)
    assert content_hash(case.folder / "run/01-distill/model") == straight
    assert (case.folder / "requeued").read_text() == "77\n", "a job that ended well is not queued again"
