"""The commands and files that `decoct launch --print` makes, word for word where that matters."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from decoct.launch.cli.app import app
from decoct.launch.jobs.job import Job, Kubernetes, Slurm, parse_secret
from decoct.launch.jobs.kubernetes import job_set, train_job
from decoct.launch.jobs.slurm import sbatch_script
from decoct.launch.jobs.torchrun import endpoint_of, torchrun_command
from decoct.models.common.errors import UserError

GOLDEN = Path(__file__).parent / "golden"


def _job(**changes: Any) -> Job:
    settings: dict[str, Any] = {
        "recipe": "my recipes/big.yaml",
        "name": "big",
        "overrides": ("stages.0.tokens=2B",),
        "out": Path("runs/big one"),
        "gpus": 8,
        "nodes": 2,
        "job_id": "big-0123abcd",
    }
    return Job(**{**settings, **changes})


def _cluster() -> Kubernetes:
    return Kubernetes(image="registry/decoct:1", namespace="ml", volume_claim="runs", secrets={"WANDB_API_KEY": "wandb/api-key"})


def _same_as_golden(name: str, text: str) -> None:
    """Compare with the stored file, which is written anew when it is missing."""
    file = GOLDEN / name
    assert file.exists(), f"write {file} from:\n{text}"
    assert text == file.read_text()


def test_torchrun_command_meets_restarts_and_logs(tmp_path: Path) -> None:
    command = torchrun_command(_job(), endpoint="node1:29500", node_rank=1, python="python")
    _same_as_golden("torchrun.txt", shlex.join(command) + "\n")
    assert shlex.split(shlex.join(command)) == command, "paths with spaces survive the shell"


def test_sbatch_file() -> None:
    settings = Slurm(partition="gpu", account="lab", time="24:00:00")
    _same_as_golden("job.sbatch", sbatch_script(_job(), settings, python="python"))


def test_blanks_and_odd_words_survive_in_the_sbatch_file() -> None:
    script = sbatch_script(_job(overrides=("name=JOB_ID HEAD_NODE",)), Slurm(), python="python")
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    options = {key: value for key, _, value in (shlex.split(line)[0].partition("=") for line in lines)}
    assert options["output"] == "runs/big one/slurm-%j.log"
    assert "'name=JOB_ID HEAD_NODE'" in script
    assert '--rdzv-endpoint "$head:29500" --rdzv-id "slurm-$SLURM_JOB_ID"' in script


def test_train_job_manifest() -> None:
    _same_as_golden("trainjob.yaml", yaml.safe_dump(train_job(_job(), _cluster()), sort_keys=False))


def test_job_set_manifest() -> None:
    _same_as_golden("jobset.yaml", yaml.safe_dump(job_set(_job(), _cluster()), sort_keys=False))


def test_one_node_meets_itself_and_several_must_be_told_where() -> None:
    assert endpoint_of(None, 1) == "localhost:0"
    assert endpoint_of("node1:29500", 2) == "node1:29500"
    for wrong in (None, "node1", "node1:", ":29500", "node1:port", "node1:99999"):
        with pytest.raises(UserError, match="HOST:PORT"):
            endpoint_of(wrong, 2)


def test_time_limits_are_slurms() -> None:
    for time in ("90", "24:00:00", "2-12", "1-00:30:00"):
        assert f"--time={time}\n" in sbatch_script(_job(), Slurm(time=time), python="python")
    for time in ("a day", "24h", "1:2:3:4"):
        with pytest.raises(UserError, match=r"--time=.* is no time limit"):
            Slurm(time=time)


@pytest.mark.parametrize("text", ["WANDB_API_KEY", "WANDB_API_KEY=abc123", "WANDB_API_KEY=a/b/c", "1X=a/b", "=a/b"])
def test_a_secrets_value_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="reference to a key of a Kubernetes secret"):
        parse_secret(text)


@pytest.mark.parametrize("target", ["local", "torchrun", "slurm", "kubernetes"])
def test_no_token_of_the_environment_is_printed(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "canary-7f3a")
    options = ["--image", "i", "--volume-claim", "v", "--secret", "HF_TOKEN=hub/token"] if target == "kubernetes" else []
    done = CliRunner().invoke(app, ["launch", "quickstart", "--target", target, "--print", "--gpus", "2", *options])
    assert done.exit_code == 0, done.output
    assert "canary-7f3a" not in done.output
    assert "decoct.launch.cli" in done.output


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--target", "cloud"], "--target='cloud' is not one of local, torchrun, slurm, kubernetes"),
        (["--gpus", "0"], "--gpus=0 must be at least 1"),
        (["--nodes", "2"], "--target local runs on this machine only, not on 2 nodes"),
        (["--target", "torchrun", "--nodes", "2"], "--rdzv-endpoint HOST:PORT"),
        (["--target", "kubernetes"], "needs --image"),
        (["--target", "kubernetes", "--image", "i", "--volume-claim", "v", "--kind", "pod"], "--kind='pod'"),
        (["stages.0.tokns=2"], "tokns"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(options: list[str], named: str) -> None:
    done = CliRunner().invoke(app, ["launch", "quickstart", *options])
    assert isinstance(done.exception, UserError)
    assert named in str(done.exception)


@pytest.mark.parametrize(("target", "tool", "file"), [("slurm", "sbatch", "job.sbatch"), ("kubernetes", "kubectl", "job.yaml")])
def test_a_missing_tool_leaves_the_file_and_says_so(
    target: str, tool: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    out = tmp_path / "run"
    options = ["--image", "i", "--volume-claim", "v"] if target == "kubernetes" else []
    done = CliRunner().invoke(app, ["launch", "quickstart", "--target", target, "--out", str(out), *options])
    assert isinstance(done.exception, UserError)
    assert f"{tool} is not installed here" in str(done.exception)
    assert "decoct.launch.cli" in (out / file).read_text()


def test_the_local_command_uses_this_interpreter() -> None:
    done = CliRunner().invoke(app, ["launch", "quickstart", "--print", "--gpus", "2", "--job-id", "fixed", "--out", "o"])
    assert shlex.split(done.output)[1] == sys.executable
    assert "--rdzv-id fixed" in done.output
