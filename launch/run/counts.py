"""Checks the number of processes per machine: too many would overload it before a message could be read."""

import os

from ...models.common.errors import UserError

MOST_PROCESSES = 1024
"""Largest number of processes on any machine."""
MOST_NODES = 65_536


def check_processes(count: int) -> None:
    """Raise UserError if this machine has fewer GPUs than ``count``, or, without GPUs, fewer cores."""
    import torch

    # NCCL refuses two ranks on one GPU; on a CPU more ranks than cores only slow each other down
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    if count > (gpus or cores):
        has = f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else f"no GPU and {cores} CPU core{'s' * (cores > 1)}"
        raise UserError(
            f"{count:,} processes (trainer.devices, or --gpus) are too many for this machine: it has {has}; give at most {gpus or cores}"
        )


def check_workers(count: int) -> None:
    """Raise UserError if each process would start more data loader workers than this machine has cores."""
    cores = os.cpu_count() or 1
    if count > cores:
        raise UserError(
            f"trainer.num_workers={count:,}: each process would start so many workers, and there are {cores} CPU cores; give at most "
            f"{cores} (with 0 the process itself reads the data, which is fast enough for tokenized text)"
        )
