"""The machine of a plan: as asked for, or this one. Where it has no GPUs, torch is not imported: that takes longer than a plan."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .duration import Speed
from .gpus import recognized
from .plan_types import Machine

if TYPE_CHECKING:
    from ...trainer.settings import TrainerSettings

_DRIVERS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")
"""Devices of which each GPU that torch can use on Linux has one: NVIDIA, its embedded boards, Windows' subsystem, AMD."""


def gpus_here() -> int:
    """Return the number of GPUs that torch sees, as ``CUDA_VISIBLE_DEVICES`` selects them."""
    # a process that has torch already may ask it at no cost
    if sys.platform == "linux" and "torch" not in sys.modules and not any(Path(driver).exists() for driver in _DRIVERS):
        return 0
    import torch

    return torch.cuda.device_count()


def first_gpu() -> tuple[str, int]:
    """Return (name, bytes) of this machine's first GPU."""
    import torch

    found = torch.cuda.get_device_properties(0)
    return found.name, found.total_memory


def planned_machine(
    trainer: "TrainerSettings", gpus: int | None, gpu_memory: int | None, nodes: int, speed: Speed
) -> tuple[Machine, Speed]:
    """Return the machine, and ``speed`` with the GPU of this machine if the plan is for it and ``gpus.recognized`` knows it.

    Args:
        trainer: Settings that select devices.
        gpus: GPUs per node; None: those here.
        gpu_memory: Bytes of one GPU; None: those of the GPU in ``speed``, or of the one here.
        nodes: Machines.
        speed: What is known of speed.
    """
    if gpu_memory is None and speed.gpu is not None:
        gpu_memory = speed.gpu.memory
    # nothing of this machine is asked for where both are given
    here = gpus_here() if gpus is None or gpu_memory is None else 0
    # memory given alone: so many GPUs as are here, else as the recipe has devices
    if gpus is None and gpu_memory is not None:
        gpus = here or (trainer.devices if isinstance(trainer.devices, int) else 1)
    on_gpu = here if gpus is None else gpus
    # a GPU that was asked for has a process, whatever the recipe says; a CPU has one unless the recipe says more
    processes = on_gpu or 1 if trainer.devices == "auto" or gpus is not None else int(trainer.devices)
    # only a GPU that is here can be asked
    if gpu_memory is None and on_gpu and here:
        name, gpu_memory = first_gpu()
        speed = replace(speed, gpu=recognized(name, gpu_memory))
    return Machine(gpus=on_gpu, nodes=nodes, processes=max(1, processes), gpu_memory=gpu_memory if on_gpu else None), speed
