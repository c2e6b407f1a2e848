"""The torchrun command of one node of a job."""

import re
import sys
from collections.abc import Sequence

from .job import Job

MODULE = "decoct.launch.cli"
AGENT = "decoct.launch.jobs.agent"
"""torchrun with exit codes of its own."""
# A restarted worker must not find the addresses of the dead in its store, and a lost node must not take the store with it.
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def torchrun_command(
    job: Job, *, endpoint: str, node_rank: int | None = None, python: str | None = None, logs: str | None = None
) -> list[str]:
    """torchrun with c10d rendezvous, automatic restarts, rank 0 on the console and every rank in a file of its own.

    Args:
        job: What to run.
        endpoint: ``host:port`` of the first node, where the ranks meet.
        node_rank: This node's number, where the machines should keep their order; None = as they come.
        python: Interpreter; None = the one that runs this.
        logs: Log folder; None = the job's.
    """
    command = [python or sys.executable, "-m", AGENT]
    command += ["--nnodes", str(job.nodes), "--nproc-per-node", str(job.gpus)]
    if node_rank is not None:
        # the first node holds the meeting place; without this the first to come would, wherever two nodes share a name
        command += ["--node-rank", str(node_rank), "--rdzv-conf", f"is_host={int(node_rank == 0)}"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", job.job_id]
    command += ["--max-restarts", str(job.restarts)]
    command += ["--log-dir", logs or str(job.logs), "--tee", "3", "--local-ranks-filter", "0"]
    return [*command, "-m", MODULE, *job.arguments()]


def endpoint_of(given: str | None, nodes: int) -> str:
    """``host:port``; one node meets itself. UserError when several nodes are not told where to meet."""
    from ...models.common.errors import UserError

    if given is None:
        if nodes == 1:
            return "localhost:0"
        raise UserError("several nodes need a meeting place: --rdzv-endpoint HOST:PORT, with a host that is the same for all of them")
    host, colon, port = given.rpartition(":")
    if not colon or not re.fullmatch(r"[A-Za-z0-9_.:\[\]%-]+", host) or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise UserError(f"--rdzv-endpoint={given!r} is no HOST:PORT; for example node1:29500")
    return given


def shell_line(command: Sequence[str]) -> str:
    """The command as a shell takes it, its environment before it."""
    import shlex

    return " ".join([*(f"{key}={value}" for key, value in ENVIRONMENT.items()), shlex.join(command)])
