"""The GPUs of this machine, without torch where there are none: its import takes longer than a plan."""

import sys
from pathlib import Path

_DRIVERS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")
"""Devices of which each GPU that torch can use on Linux has one: NVIDIA, its embedded boards, Windows' subsystem, AMD."""


def gpus_here() -> int:
    """Return the number of GPUs that torch sees, as ``CUDA_VISIBLE_DEVICES`` selects them."""
    # a process that has torch already may ask it at no cost
    if sys.platform == "linux" and "torch" not in sys.modules and not any(Path(driver).exists() for driver in _DRIVERS):
        return 0
    import torch

    return torch.cuda.device_count()


def memory_here() -> int:
    """Return the bytes of this machine's first GPU."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory
