"""An sbatch file: one torchrun on each node, saved and queued again when Slurm takes the nodes back."""

import re
import shlex

from ...models.common.errors import UserError
from .job import Job, Slurm
from .torchrun import ENVIRONMENT, torchrun_command

PORT = 29500
PREEMPTED = 143
"""What a run ends with after SIGTERM, its checkpoint written."""


def sbatch_script(job: Job, settings: Slurm, *, python: str | None = None) -> str:
    """The file. Slurm sends USR1 ``job.grace`` seconds before the limit; the batch shell hands it on as SIGTERM and queues the job again.

    Log files and the run folder lie relative to where sbatch is called, as the recipe does. Slurm opens its log before the script runs:
    the run folder must be there (`decoct launch` makes it; after --print, mkdir it, as the file says).

    Raises: UserError when the run folder's or the recipe's name holds what Slurm itself reads anew.
    """
    for what, text in (("--out", str(job.out)), ("the recipe's name", job.name)):
        if "\\" in text or re.search("packjob|hetjob", text, re.IGNORECASE):
            raise UserError(f"{what} {text!r} holds a word that Slurm reads anew (a backslash, packjob or hetjob); choose another name")
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus,
        "partition": settings.partition,
        "account": settings.account,
        "time": settings.time,
        "signal": f"B:USR1@{job.grace}",
        "output": str(job.out).replace("%", "%%") + "/slurm-%j.log",
        "open-mode": "append",
    }
    header = "\n".join(f"#SBATCH --{key}={_quoted(value)}" for key, value in options.items() if value is not None)
    command = torchrun_command(job, endpoint="", python=python)
    words = [shlex.quote(word) for word in command]
    # $head and the job's id are the shell's to fill in; the first of these options are torchrun's own
    words[command.index("--rdzv-endpoint") + 1] = f'"$head:{PORT}"'
    words[command.index("--rdzv-id") + 1] = '"slurm-$SLURM_JOB_ID"'
    line = " ".join(words)
    exports = "\n".join(f"export {key}={value}" for key, value in ENVIRONMENT.items())
    return _SCRIPT.format(header=header, exports=exports, line=line, folder=shlex.quote(str(job.out)), preempted=PREEMPTED)


def _quoted(value: object) -> str:
    """As sbatch reads an option: in double quotes, with backslashes before quotes, unless all of it is plain."""
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
