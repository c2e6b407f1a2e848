"""The verb `launch`: makes the command or file of a target, and prints or starts it."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...models.common.errors import UserError
from ..jobs.job import Job, Kubernetes, Slurm, dns_name, new_job_id, parse_secret
from ..jobs.torchrun import ENVIRONMENT, endpoint_of, shell_line, torchrun_command
from ..run.counts import MOST_NODES, MOST_PROCESSES, check_processes

TARGETS = ("local", "torchrun", "slurm", "kubernetes")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Options of the command line, apart from the recipe."""

    target: str
    show: bool
    """Print instead of starting."""
    gpus: int | None
    nodes: int
    restarts: int
    out: Path | None
    job_id: str | None
    endpoint: str | None
    node_rank: int | None
    grace: int
    slurm: Slurm
    image: str | None
    namespace: str
    volume_claim: str | None
    secrets: Sequence[str]
    kind: str


def run_launch(recipe: str, overrides: Sequence[str], choices: Choices) -> None:
    """Launch; ends with the job's exit code where the job runs here."""
    if choices.target not in TARGETS:
        raise UserError(f"--target={choices.target!r} is not one of {', '.join(TARGETS)}")
    counts = (
        ("--gpus", choices.gpus, 1, MOST_PROCESSES),
        ("--nodes", choices.nodes, 1, MOST_NODES),
        ("--max-restarts", choices.restarts, 0, 1000),
        ("--grace", choices.grace, 0, 65_535),
    )
    # typing errors with a zero too many would start so many processes, or pods, that a machine or a cluster hangs
    for option, value, least, most in counts:
        if value is not None and not least <= value <= most:
            raise UserError(f"{option}={value} must be at least {least} and at most {most:,}")
    job = _job(recipe, overrides, choices)
    {"local": _local, "torchrun": _torchrun, "slurm": _slurm, "kubernetes": _kubernetes}[choices.target](job, choices)


def _job(recipe: str, overrides: Sequence[str], choices: Choices) -> Job:
    """Return the job, after the recipe has been read: a mistake in it is reported before anything is queued."""
    from ...configs.loader import load_recipe
    from ..run.processes import wanted_processes
    from ..terminal.imported_code import tell_imported

    found = load_recipe(recipe, overrides, tell=tell_imported)
    # without --gpus the recipe's own number of processes
    gpus = choices.gpus or wanted_processes(found.trainer.devices)
    # processes of several nodes must agree on the id without talking
    shared = f"{dns_name(found.name)}-job" if choices.target == "torchrun" and choices.nodes > 1 else new_job_id(found.name)
    return Job(
        recipe=recipe,
        name=found.name,
        overrides=tuple(overrides),
        out=choices.out or Path("runs") / found.name,
        gpus=gpus,
        nodes=choices.nodes,
        restarts=choices.restarts,
        job_id=choices.job_id or shared,
        grace=choices.grace,
    )


def _local(job: Job, choices: Choices) -> None:
    from ..run.processes import Agent, run_under_torchrun

    if job.nodes != 1:
        raise UserError(f"--target local runs on this machine only, not on {job.nodes} nodes; use --target torchrun on each node, or slurm")
    if choices.show:
        # port 0: torchrun takes a free one
        print(shell_line(torchrun_command(job, endpoint="localhost:0")))
        return
    check_processes(job.gpus)
    job.logs.mkdir(parents=True, exist_ok=True)
    agent = Agent(processes=job.gpus, restarts=job.restarts, logs=job.logs / job.job_id, grace=job.grace)
    if code := run_under_torchrun(job.arguments(), agent):
        raise SystemExit(code)


def _torchrun(job: Job, choices: Choices) -> None:
    command = torchrun_command(job, endpoint=endpoint_of(choices.endpoint, job.nodes), node_rank=choices.node_rank)
    if choices.show:
        print(shell_line(command))
        return
    check_processes(job.gpus)
    job.logs.mkdir(parents=True, exist_ok=True)
    os.environ.update(ENVIRONMENT)
    # exec throws away what is still in Python's buffers
    sys.stdout.flush()
    # the agent takes this process's place: signals reach it, and its exit code is ours
    os.execvp(command[0], command)


def _slurm(job: Job, choices: Choices) -> None:
    from ..jobs.slurm import sbatch_script

    script = sbatch_script(job, choices.slurm)
    if choices.show:
        print(script, end="")
        return
    # written even where there is no sbatch: the file can be copied to a machine that has it
    file = _write(job.out / "job.sbatch", script)
    _call(
        ["sbatch", str(file.absolute())],
        "sbatch",
        f"the job file is written: {file}; copy it to a machine that has Slurm, and run sbatch there",
    )


def _kubernetes(job: Job, choices: Choices) -> None:
    from ..jobs.kubernetes import manifest

    # no default could be right on another's cluster
    if not choices.image or not choices.volume_claim:
        raise UserError("--target kubernetes needs --image (an image with decoct) and --volume-claim (for runs and cache)")
    if choices.kind not in ("trainjob", "jobset"):
        raise UserError(f"--kind={choices.kind!r} is not one of trainjob, jobset")
    secrets = dict(parse_secret(text) for text in choices.secrets)
    cluster = Kubernetes(image=choices.image, namespace=choices.namespace, volume_claim=choices.volume_claim, secrets=secrets)
    text = manifest(job, cluster, choices.kind)  # pyright: ignore[reportArgumentType] - checked above
    if choices.show:
        print(text, end="")
        return
    file = _write(job.out / "job.yaml", text)
    _call(
        ["kubectl", "apply", "-f", str(file.absolute())],
        "kubectl",
        f"the manifest is written: {file}; apply it on a machine that has kubectl",
    )


def _write(file: Path, text: str) -> Path:
    from ...models.common.files import check_writable_folder, write_text_atomic

    check_writable_folder(file.parent, "the run folder (runs/<name>, or --out)")
    write_text_atomic(file, text)
    return file


def _call(command: list[str], tool: str, otherwise: str) -> None:
    try:
        done = subprocess.run(command, check=False)
    except FileNotFoundError:
        raise UserError(f"{tool} is not installed here; {otherwise}") from None
    if done.returncode:
        raise UserError(f"{tool} ended with exit code {done.returncode}; {otherwise}")
