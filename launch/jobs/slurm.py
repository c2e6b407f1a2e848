"""An sbatch file: one torchrun on each node, saved and queued again when Slurm takes the nodes back."""

import shlex
from dataclasses import replace

from .job import Job, Slurm
from .torchrun import ENVIRONMENT, torchrun_command

PORT = 29500
_HEAD, _ID = "\0head", "\0id"  # words that no path and no setting can be
PREEMPTED = 143
"""What a run ends with after SIGTERM, its checkpoint written."""


def sbatch_script(job: Job, settings: Slurm, *, python: str | None = None) -> str:
    """The file. Slurm sends USR1 ``job.grace`` seconds before the limit; the batch shell hands it on as SIGTERM and queues the job again.

    Log files and the run folder lie relative to where sbatch is called, as the recipe does. Slurm opens its log before the script runs:
    the run folder must be there (`decoct launch` makes it; after --print, mkdir it, as the file says).
    """
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus,
        "partition": settings.partition,
        "account": settings.account,
        "time": settings.time,
        "signal": f"B:USR1@{job.grace}",
        "output": f"{job.out}/slurm-%j.log",
        "open-mode": "append",
    }
    header = "\n".join(f"#SBATCH --{key}={_quoted(value)}" for key, value in options.items() if value is not None)
    # $head and the job's id are the shell's to fill in
    fillings = {_HEAD: f'"$head:{PORT}"', _ID: '"slurm-$SLURM_JOB_ID"'}
    command = torchrun_command(replace(job, job_id=_ID), endpoint=_HEAD, python=python)
    line = " ".join(fillings.get(word) or shlex.quote(word) for word in command)
    exports = "\n".join(f"export {key}={value}" for key, value in ENVIRONMENT.items())
    return _SCRIPT.format(header=header, exports=exports, line=line, folder=shlex.quote(str(job.out)), preempted=PREEMPTED)


def _quoted(value: object) -> str:
    """As sbatch reads an option: in double quotes where it has blanks."""
    text = str(value)
    return f'"{text}"' if any(c.isspace() for c in text) else text


_SCRIPT = """#!/bin/bash
{header}
#SBATCH --requeue
# Slurm opens its log before this script runs: {folder} must be there (decoct launch makes it).

set -u
mkdir -p {folder}
{exports}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 {line} &
run=$!

# Time is nearly over, or the nodes are wanted back: all ranks save at the end of their step and leave.
stopping=0
stop() {{
    stopping=1
    kill -TERM "$run" 2>/dev/null
}}
trap stop USR1 TERM

wait "$run"
code=$?
while kill -0 "$run" 2>/dev/null; do
    wait "$run"
    code=$?
done

if [ "$stopping" = 1 ] || [ "$code" = {preempted} ]; then
    # the same file again: the run continues from its last checkpoint
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
"""
