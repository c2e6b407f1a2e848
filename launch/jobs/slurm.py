"""An sbatch file: one torchrun per node; when Slurm takes the nodes back, the run is saved and requeued."""

import re
import shlex

from ...models.common.errors import UserError
from .job import Job, Slurm
from .torchrun import ENVIRONMENT, torchrun_command

PORT = 29500
PREEMPTED = 143
"""Exit code of a run after SIGTERM, with its checkpoint written."""


def sbatch_script(job: Job, settings: Slurm, *, python: str | None = None) -> str:
    """Return the file. Slurm sends USR1 ``job.grace`` seconds before the limit; the batch shell passes it on as SIGTERM and requeues the
    job.

    Log files, the run folder and the recipe are relative to the folder in which sbatch is called. Slurm opens its log before the script
    runs, so the run folder must exist (`decoct launch` makes it; after --print, create it, as the file explains).

    Raises: UserError if the name of the run folder or the recipe has something that Slurm interprets.
    """
    for what, text in (("--out", str(job.out)), ("the recipe's name", job.name)):
        if "\\" in text or re.search("packjob|hetjob", text, re.IGNORECASE):
            raise UserError(
                f"{what} {text!r} contains something that Slurm interprets (a backslash, packjob or hetjob); choose another name"
            )
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        # one torchrun per node, which starts the ranks itself
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus,
        "partition": settings.partition,
        "account": settings.account,
        "time": settings.time,
        # B: to the batch shell alone; without it Slurm signals the job steps, whose ranks know SIGTERM and not USR1
        "signal": f"B:USR1@{job.grace}",
        # sbatch expands %j and its like in this option
        "output": str(job.out).replace("%", "%%") + "/slurm-%j.log",
        # a requeued job has the same number, and would truncate the log of its earlier start
        "open-mode": "append",
    }
    header = "\n".join(f"#SBATCH --{key}={_quoted(value)}" for key, value in options.items() if value is not None)
    command = torchrun_command(job, endpoint="", python=python)
    words = [shlex.quote(word) for word in command]
    # unquoted, so that the shell fills in $head and the job's id; index() finds the first match, which is torchrun's own option
    words[command.index("--rdzv-endpoint") + 1] = f'"$head:{PORT}"'
    words[command.index("--rdzv-id") + 1] = '"slurm-$SLURM_JOB_ID"'
    line = " ".join(words)
    exports = "\n".join(f"export {key}={value}" for key, value in ENVIRONMENT.items())
    return _SCRIPT.format(header=header, exports=exports, line=line, folder=shlex.quote(str(job.out)), preempted=PREEMPTED)


def _quoted(value: object) -> str:
    """Quote an option's value for sbatch: in double quotes with escaped quotes, unless it is plain."""
    text = str(value)
    return text if re.fullmatch(r"[A-Za-z0-9_@%+=:,./-]+", text) else '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


_SCRIPT = """#!/bin/bash
{header}
#SBATCH --requeue
# Slurm opens its log before this script runs: {folder} must be there (decoct launch makes it).

set -u
mkdir -p -- {folder}
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
