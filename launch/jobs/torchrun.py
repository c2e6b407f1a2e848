"""The torchrun command of one node of a job."""

import re
import sys
from collections.abc import Sequence

from .job import Job

MODULE = "decoct.launch.cli"
AGENT = "decoct.launch.jobs.agent"
"""Module that runs torchrun with meaningful exit codes."""
# a restarted worker must not find addresses of dead ones in its store, and a lost node must not take the store with it
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def torchrun_command(
    job: Job, *, endpoint: str, node_rank: int | None = None, python: str | None = None, logs: str | None = None
) -> list[str]:
    """Return the torchrun command: c10d rendezvous, automatic restarts, rank 0 on the console and one log file per rank.

    Args:
        job: What to run.
        endpoint: ``host:port`` of the first node, the rendezvous.
        node_rank: This node's number, to fix the order of the machines; None: in order of arrival.
        python: Interpreter; None: the running one.
        logs: Log folder; None: the job's.
    """
    command = [python or sys.executable, "-m", AGENT]
    command += ["--nnodes", str(job.nodes), "--nproc-per-node", str(job.gpus)]
    if node_rank is not None:
        # the first node hosts the rendezvous; without this the first to arrive would, if two nodes share a name
        command += ["--node-rank", str(node_rank), "--rdzv-conf", f"is_host={int(node_rank == 0)}"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", job.job_id]
    command += ["--max-restarts", str(job.restarts)]
    # both streams of each rank go to its log file, and those of rank 0 to the console too
    command += ["--log-dir", logs or str(job.logs), "--tee", "3", "--local-ranks-filter", "0"]
    return [*command, "-m", MODULE, *job.arguments()]


def endpoint_of(given: str | None, nodes: int) -> str:
    """Return ``host:port``; a single node is its own rendezvous. UserError if several nodes have no endpoint."""
    from ...models.common.errors import UserError

    if given is None:
        if nodes == 1:
            return "localhost:0"
        raise UserError("several nodes need a meeting place: --rdzv-endpoint HOST:PORT, with a host that is the same for all of them")
    # from the right: an IPv6 address has colons of its own
    host, colon, port = given.rpartition(":")
    if not colon or not re.fullmatch(r"[A-Za-z0-9_.:\[\]%-]+", host) or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise UserError(f"--rdzv-endpoint={given!r} is no HOST:PORT; for example node1:29500")
    return given


def shell_line(command: Sequence[str]) -> str:
    """Return the command as a shell line, with its environment variables in front."""
    import shlex

    return " ".join([*(f"{key}={value}" for key, value in ENVIRONMENT.items()), shlex.join(command)])
