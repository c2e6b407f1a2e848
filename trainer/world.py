"""The processes of a run as training sees them, and the few collectives it needs.

Ranks come from torchrun's environment; nothing here ever starts a process. One process needs no process group, and every
function below then returns its input.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among all of a run."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and talks to the user."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Machines of the run."""
        return self.size // self.local_size


def current_world() -> World:
    """The world that torchrun's environment variables describe; one process without them."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return World()
    read = {name: int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    return World(rank=read["RANK"], local_rank=read["LOCAL_RANK"], size=read["WORLD_SIZE"], local_size=read["LOCAL_WORLD_SIZE"])


def connect(world: World) -> None:
    """Open the process group once (gloo for CPU tensors, NCCL for CUDA ones); nothing to do for a single process."""
    if world.size == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


def sum_over_ranks(values: Tensor) -> Tensor:
    """Elementwise sum of a tensor over all ranks, in place, on its own device."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def value_of_first(value: int) -> int:
    """The integer that rank 0 passes, on every rank."""
    if not dist.is_initialized():
        return value
    box = torch.tensor([value], dtype=torch.int64)
    dist.broadcast(box, src=0)
    return int(box)


def gather_bytes(data: bytes) -> list[bytes]:
    """Each rank's bytes, in rank order, on every rank. Lengths may differ."""
    if not dist.is_initialized():
        return [data]
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(data)]))
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8)
    if data:
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return [bytes(part[: int(length)].numpy()) for part, length in zip(parts, lengths)]
