"""More processes than a machine can run are refused before any of them starts."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from decoct.launch.cli.app import app
from decoct.launch.jobs import agent
from decoct.launch.run import counts
from decoct.launch.run import processes as workers
from decoct.launch.run.processes import Agent, run_under_torchrun
from decoct.models.common.errors import UserError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores, no GPU, and nothing is ever started."""
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(workers, "_run_once", lambda *_: pytest.fail("processes were started"))
    monkeypatch.setattr("torch.distributed.run.run", lambda _: pytest.fail("processes were started"))
    monkeypatch.setattr("os.execvp", lambda *_: pytest.fail("processes were started"))


@pytest.mark.usefixtures("machine")
def test_as_many_processes_as_cores_and_no_more() -> None:
    counts.check_processes(4)
    with pytest.raises(UserError, match=r"5 processes .* no GPU and 4 CPU cores; give at most 4"):
        counts.check_processes(5)


@pytest.mark.usefixtures("machine")
def test_gpus_count_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match="it has 2 GPUs; give at most 2"):
        counts.check_processes(3)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "quickstart", "trainer.devices=900"], "900 processes"),
        (["run", "quickstart", "trainer.devices=100000"], "100,000 is out of range"),
        (["run", "quickstart", "trainer.num_workers=5"], "trainer.num_workers=5"),
        (["run", "quickstart", "trainer.num_workers=100000"], "100,000 is out of range"),
        (["cache", "quickstart", "teacher.cache=hybrid", "trainer.devices=900"], "900 processes"),
        (["launch", "quickstart", "--gpus", "900"], "900 processes"),
        (["launch", "quickstart", "--gpus", "100000"], "--gpus=100000 must be at least 1 and at most 1,024"),
        (["launch", "quickstart", "--gpus", "900", "--target", "torchrun"], "900 processes"),
        (["launch", "quickstart", "--nodes", "1000000", "--target", "slurm"], "--nodes=1000000"),
        (["launch", "quickstart", "--max-restarts", "1000000"], "--max-restarts=1000000"),
    ],
)
def test_a_count_is_refused_before_anything_is_made(
    arguments: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, UserError), done.output
    assert named in str(done.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("machine")
def test_the_agents_refuse_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="100,000 processes"):
        run_under_torchrun([], Agent(processes=100_000))
    assert agent.main(["--nproc-per-node", "100000", "--rdzv-id", "x", "-m", "nothing"]) == 2
    assert "100,000 processes" in capsys.readouterr().err


@pytest.mark.usefixtures("machine")
def test_a_file_for_other_machines_may_name_what_they_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["launch", "quickstart", "--gpus", "8", "--nodes", "2", "--target", "slurm", "--print"])
    assert done.exit_code == 0, done.output
    assert "--nproc-per-node 8" in done.output
