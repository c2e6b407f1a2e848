"""Starts the processes of a run under torchrun's agent, restarts them after a crash, and ends the job after a final exit code.

torchrun's agent restarts its workers after any failure. A user's mistake, a failed gate, NaN, Ctrl-C and a preemption would end the same
way again, so the exit code decides: ``FINAL_CODES`` end the job. Under a torchrun that somebody else started, a worker leaves its code in a
file of its agent, and restarted workers of that agent end with it at once.
"""

import hashlib
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .counts import check_processes

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

FINAL_CODES = (2, 3, 130, 143)
"""Exit codes without a restart: user error, failed gate, Ctrl-C, SIGTERM."""
_KILLED_BY_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True, kw_only=True)
class Agent:
    """How the processes of one machine are supervised."""

    processes: int
    restarts: int = 0
    """Number of restarts after a process dies."""
    logs: Path | None = None
    """Folder for the output of each rank; that of rank 0 is also on the console."""
    grace: int = 30
    """Seconds between SIGTERM and SIGKILL."""


def wanted_processes(devices: int | str) -> int:
    """Return the number of processes for ``trainer.devices``: auto means every GPU, or one process on a CPU."""
    import torch

    if devices == "auto":
        return max(1, torch.cuda.device_count())
    return int(devices)


def run_under_torchrun(arguments: Sequence[str], agent: Agent) -> int:
    """Run ``decoct <arguments>`` under torchrun's agent on this machine, again after a crash; returns the exit code to end with.

    Raises: UserError when the machine cannot run so many processes.
    """
    check_processes(agent.processes)
    attempt = 0
    while True:
        code, decided = _run_once(arguments, agent, attempt)
        # torchrun's own max_restarts stays 0: it would restart a user's mistake as readily as a crash
        if code == 0 or decided or code in FINAL_CODES or attempt == agent.restarts:
            return code
        attempt += 1
        told = f"start {attempt + 1} of {agent.restarts + 1} continues from the last checkpoint"
        print(f"decoct: a process died (exit code {code}); {told}", file=sys.stderr, flush=True)


def _run_once(arguments: Sequence[str], agent: Agent, attempt: int) -> tuple[int, bool]:
    """Return (exit code, whether the workers report that a restart would end in the same way)."""
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # the workers have already reported the error; the agent would add its own traceback
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.launcher").setLevel(logging.CRITICAL)
    # torch gives every process as many threads as the machine has cores; torchrun sets 1. Both are wrong for several ranks on a CPU
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // agent.processes)))
    # a new id for each attempt: no worker of an earlier one can join this rendezvous, and its outcome file is another
    run_id = uuid.uuid4().hex
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=agent.processes,
        run_id=run_id,
        rdzv_backend="c10d",
        # port 0: the agent picks a free one, so two runs on a machine do not collide
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        # seconds between looks at the workers: how long a death goes unnoticed
        monitor_interval=0.2,
        **_options(agent, attempt),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "decoct.launch.cli", *arguments)
    except ChildFailedError as failure:
        tell_killed(failure)
        return exit_code(failure, run_id)
    except SignalException as stopped:
        # the agent itself got the signal (128 + number is what shells report); whoever sent it wants the job to end
        return 128 + int(stopped.sigval), True
    finally:
        forget_outcome(os.getpid(), run_id)
    return 0, True


def exit_code(failure: "ChildFailedError", run_id: str) -> tuple[int, bool]:
    """Return (exit code of this agent's job, whether its workers report that a restart would end in the same way)."""
    decided = _read_outcome(os.getpid(), run_id)
    if decided is not None:
        return decided, True
    # negative codes are signals: mostly the SIGTERM that the agent sends to the other workers after the first has failed
    codes = [child.exitcode for child in failure.failures.values()]
    return next((code for code in codes if code > 0), 1), False


_KILLED = {
    -signal.SIGKILL: "the kernel does this when memory runs out: lower trainer.micro_batch or data.seq_length, or use fewer processes",
    -signal.SIGBUS: "a file that it was reading was cut, or its disk failed",
    -signal.SIGSEGV: "a library crashed",
    -signal.SIGABRT: "a library gave up; its last words are above",
}


def tell_killed(failure: "ChildFailedError") -> None:
    """Report which worker died by a signal and what that means; the worker itself could not."""
    for rank, child in failure.failures.items():
        if (why := _KILLED.get(child.exitcode)) is not None:
            name = signal.Signals(-child.exitcode).name
            print(f"decoct: rank {rank} was ended by {name}: {why}", file=sys.stderr, flush=True)


def _options(agent: Agent, attempt: int) -> dict[str, Any]:
    """Return the options for logs and grace that this torch supports."""
    from dataclasses import fields

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    options: dict[str, Any] = {}
    if agent.logs is not None:
        place = agent.logs / f"start-{attempt}"
        place.mkdir(parents=True, exist_ok=True)
        # every rank writes into its own files; only rank 0 is also shown, since all ranks print the same
        options["logs_specs"] = DefaultLogsSpecs(log_dir=str(place), tee=Std.ALL, local_ranks_filter={0})
    # older releases of torch lack the field
    if "shutdown_timeout" in {field.name for field in fields(LaunchConfig)}:
        options["shutdown_timeout"] = agent.grace
    return options


def die_with_agent() -> None:
    """Ask Linux to kill this worker if its agent is killed: an orphan would keep its GPU and its place in every collective.

    SIGKILL, not SIGTERM: a save needs all ranks, and those of other machines are to be restarted, not stopped.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    import ctypes

    # a fork does not inherit the setting, so the agent cannot make it for its workers
    ctypes.CDLL(None, use_errno=True).prctl(_KILLED_BY_PARENTS_DEATH, signal.SIGKILL)


def remember_outcome(code: int) -> None:
    """Leave a final exit code for the agent, and for the workers that it may start next; 0 when the run is finished."""
    if run_id := os.environ.get("TORCHELASTIC_RUN_ID"):
        # the parent of a worker is its agent
        file = _outcome_file(os.getppid(), run_id)
        whole = file.with_suffix(f".{os.getpid()}")
        whole.write_text(str(code))
        whole.replace(file)  # atomic: readers never see an empty file


def remembered_outcome() -> int | None:
    """Return the final exit code of this agent's earlier workers; None if there is none."""
    # the first workers of an agent have no predecessors; a file of that name would be another job's
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    return _read_outcome(os.getppid(), os.environ.get("TORCHELASTIC_RUN_ID", ""))


def told_by_another(seconds: float = 1.0) -> bool:
    """Return whether another worker of this agent has left a final code and so has reported the error; waits briefly for one that fails
    too."""
    deadline = time.monotonic() + seconds
    while (found := _read_outcome(os.getppid(), os.environ.get("TORCHELASTIC_RUN_ID", ""))) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return found is not None


def leave(code: int) -> None:
    """End a worker at once when its run is over, without closing its connections (which sometimes aborts, see ``Session.close``).

    Returns if this process has no connections; then the interpreter can end it as usual.
    """
    # looked up, not imported: importing torch only to end a process would cost seconds
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    # no atexit hooks, no destructors: gloo's and NCCL's teardown waits for peers that may have left
    os._exit(code)


def forget_outcome(agent: int, run_id: str) -> None:
    """Remove the files of an agent's workers."""
    _outcome_file(agent, run_id).unlink(missing_ok=True)


def _read_outcome(agent: int, run_id: str) -> int | None:
    try:
        return int(_outcome_file(agent, run_id).read_text())
    except (OSError, ValueError):
        return None


def _started(process: int) -> str:
    """Return the start time of a process in the kernel's ticks; empty without /proc."""
    try:
        # the name in brackets may contain spaces; the start time is the 22nd field
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _outcome_file(agent: int, run_id: str) -> Path:
    """Return the file's path. It is named by job, agent and the agent's start time: one machine may run two agents of a job, and the kernel
    reuses process numbers."""
    name = hashlib.sha256(f"{os.getuid()}/{agent}/{_started(agent)}/{run_id}".encode()).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"decoct-{name}.outcome"
