"""Starting a run's processes: ``decoct run`` on more than one device starts torchrun's agent itself, before any stage."""

import os
import sys
import uuid
from collections.abc import Sequence


def wanted_processes(devices: int | str) -> int:
    """Processes that ``trainer.devices`` asks for on this machine: auto is every GPU, or one process on a CPU."""
    import torch

    if devices == "auto":
        return max(1, torch.cuda.device_count())
    return int(devices)


def run_under_torchrun(arguments: Sequence[str], processes: int) -> int:
    """Run ``decoct <arguments>`` in ``processes`` workers under torchrun's agent and return the exit code they ended with."""
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The workers have already told the user what went wrong; the agent would add its own traceback.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "decoct.launch.cli", *arguments)
    except ChildFailedError as failure:
        codes = [child.exitcode for child in failure.failures.values()]
        return next((code for code in codes if code > 0), 1)
    return 0
