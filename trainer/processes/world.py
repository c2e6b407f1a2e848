"""The processes of a run, and the few collective operations that training needs.

Ranks come from torchrun's environment; this module starts no process. A single process needs no process group, and every function below
then returns its input.
"""

import os
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ...models.common.errors import UserError

MEETING_TIMEOUT = timedelta(minutes=10)
"""Longest time to wait for all ranks to start."""


@dataclass(frozen=True)
class World:
    """This process among all of a run."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and prints messages."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Number of machines in the run."""
        return self.size // self.local_size


def current_world() -> World:
    """The world that torchrun's environment variables describe; a single process without them.

    Raises:
        UserError: some of the variables are missing, or are not numbers.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return World()
    try:
        read = {name: int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    except (KeyError, ValueError) as error:
        raise UserError(f"TORCHELASTIC_RUN_ID is set, but the other variables of torchrun are incomplete ({error}); unset it") from None
    return World(rank=read["RANK"], local_rank=read["LOCAL_RANK"], size=read["WORLD_SIZE"], local_size=read["LOCAL_WORLD_SIZE"])


def connect(world: World) -> None:
    """Opens the process group once (gloo for CPU tensors, NCCL for CUDA tensors); a single process needs none."""
    if world.size == 1 or dist.is_initialized():
        return
    # the store of torchrun, at MASTER_ADDR and MASTER_PORT
    store, rank, size = next(iter(rendezvous("env://")))
    # gloo also with GPUs: the small collectives of checkpoints and messages are on the CPU
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=_fresh_store(store, rank, size), rank=rank, world_size=size)


def _fresh_store(store: Store, rank: int, size: int) -> Store:
    """A part of the store that only this start of all ranks uses.

    torchrun gives restarted workers the store of the dead ones, which still holds their addresses (seen with torch 2.13: connecting to
    them fails or hangs). So rank 0 makes a random name and sends it to each rank in answer to a random word of that rank. Words that dead
    workers have left are answered too, but nobody acknowledges these answers.
    """
    # chosen by rank 0 alone; the other ranks overwrite theirs with the answer
    name = uuid.uuid4().hex
    if rank:
        # rank N: ask under a word that no earlier start can have used, so that an old answer cannot be taken for this one
        word = uuid.uuid4().hex
        store.set(f"hello/{rank}", word)
        store.wait([f"answer/{word}"], MEETING_TIMEOUT)
        name = store.get(f"answer/{word}").decode()
        # acknowledged under the name itself: rank 0 goes on only when every rank of this start has it
        store.set(f"here/{name}/{rank}", "1")
        return PrefixStore(name, store)
    # rank 0: answer until all have acknowledged. The greeting is read again each round, because a living rank may overwrite a dead one's
    missing, deadline = set(range(1, size)), time.monotonic() + MEETING_TIMEOUT.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", name)
        time.sleep(0.02)
        missing -= {other for other in missing if store.check([f"here/{name}/{other}"])}
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(missing)} did not come within {MEETING_TIMEOUT}; look at their logs and at the network")
    return PrefixStore(name, store)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Elementwise sum of a tensor over all ranks, in place, on its own device."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def max_over_ranks(values: Tensor) -> Tensor:
    """Elementwise maximum of a tensor over all ranks, in place, on its own device."""
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def value_of_first(value: int) -> int:
    """The integer of rank 0, on every rank."""
    if not dist.is_initialized():
        return value
    # on the CPU, so over gloo: no GPU is made to wait
    box = torch.tensor([value], dtype=torch.int64)
    dist.broadcast(box, src=0)
    return int(box)


def bytes_of_first(data: bytes) -> bytes:
    """The bytes of rank 0, on every rank."""
    if not dist.is_initialized():
        return data
    box = torch.zeros(value_of_first(len(data)), dtype=torch.uint8)
    if dist.get_rank() == 0 and data:
        box.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(box, src=0)
    return bytes(box.numpy())


def gather_bytes(data: bytes) -> list[bytes]:
    """Each rank's bytes, in rank order, on every rank. Lengths may differ."""
    if not dist.is_initialized():
        return [data]
    # two collectives on every rank, also on one without data: first the lengths, then the bytes padded to the longest
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(data)]))
    longest = max(int(length) for length in lengths)
    # all_gather needs equal sizes
    padded = torch.zeros(longest, dtype=torch.uint8)
    if data:
        # frombuffer refuses empty buffers, and warns of read-only ones such as bytes
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return [bytes(part[: int(length)].numpy()) for part, length in zip(parts, lengths)]
