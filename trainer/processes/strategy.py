"""How several processes share a student: chosen by ``trainer.strategy``, carried out by Lightning's strategies.

Both strategies give the numbers of a single process: gradients are averaged over ranks and then scaled in the same way, weights are fp32,
and the optimizer is elementwise. Under DDP every rank holds the whole student, under FSDP2 a share.
"""

from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from .. import settings

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

    from .world import World

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Longest time that one rank waits for another; the first step waits for the slowest rank to load its teacher."""
# fp32 weight 4, gradient 4, and moments: 2 x 4, or 2 x 1 with a scale per 256, or none on the device when they are paged
_BYTES_A_PARAMETER = {"adamw": 16.0, "adamw-8bit": 10.1, "paged-adamw-8bit": 8.0}
_USABLE = 0.6
"""Largest share of a GPU for weights, gradients and moments; the rest is for activations and logits."""


def choose_strategy(
    wanted: settings.Strategy, *, ranks: int, parameters: int, optimizer: settings.Optimizer, teacher_bytes: int, device_bytes: int | None
) -> Literal["ddp", "fsdp2"]:
    """The strategy of a training stage.

    Args:
        wanted: The recipe's ``trainer.strategy``; auto = fsdp2 when ddp would fill more than 60 % of a GPU with weights, gradients, moments
            and the teacher, else ddp.
        ranks: Number of processes; with one both strategies are the same.
        parameters: Number of the student's parameters.
        optimizer: Determines the bytes of the moments.
        teacher_bytes: Bytes of the teacher on each device.
        device_bytes: Memory of one GPU; None on a CPU.
    """
    if wanted != "auto":
        return wanted
    if ranks == 1 or device_bytes is None:
        return "ddp"
    held = parameters * _BYTES_A_PARAMETER[optimizer] + teacher_bytes
    return "fsdp2" if held > _USABLE * device_bytes else "ddp"


def device_bytes() -> int | None:
    """Memory of this process's GPU; None without one."""
    import torch

    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if torch.cuda.is_available() else None


def shards(chosen: Literal["ddp", "fsdp2"], world: "World") -> bool:
    """Whether the student is sharded over ranks. A single process holds it whole with both strategies."""
    return chosen == "fsdp2" and world.size > 1


def lightning_strategy(chosen: Literal["ddp", "fsdp2"], world: "World") -> "Strategy | Literal['auto']":
    """Lightning's strategy object. The process groups are already open (``world.connect``) and stay open."""
    # here and not above: the plan chooses strategies without loading Lightning
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    if world.size == 1:
        return "auto"
    if shards(chosen, world):
        # its own default puts nodes in the first place and tensor parallelism inside a node
        # Lightning needs both sizes: one mesh dimension with all ranks, and no tensor parallelism.
        return ModelParallelStrategy(data_parallel_size=world.size, tensor_parallel_size=1, timeout=COLLECTIVE_TIMEOUT)
    # Every parameter gets a gradient in each step (``RoundedWeight`` attaches unused scales), so none is searched for. Buffers need no
    # broadcast: hooks change them alike on every rank. Buckets as views save a second copy of all gradients.
    return DDPStrategy(find_unused_parameters=False, broadcast_buffers=False, gradient_as_bucket_view=True, timeout=COLLECTIVE_TIMEOUT)
