"""How several processes share a student: chosen by ``trainer.strategy``, carried out by Lightning's strategies.

All strategies give the numbers of a single process: gradients are averaged over ranks and then scaled in the same way, weights are fp32,
and the optimizer is elementwise. Under DDP every rank holds the whole student, under FSDP2 a share, and under HSDP the ranks of one machine
hold it together.
"""

from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from ...models.common.errors import UserError
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
) -> settings.ChosenStrategy:
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


def shards(chosen: settings.ChosenStrategy, world: "World") -> bool:
    """Whether the student is sharded over ranks. A single process holds it whole with every strategy."""
    return chosen != "ddp" and world.size > 1


def copies(chosen: settings.ChosenStrategy, world: "World") -> int:
    """Number of machines that each hold all of a sharded student; 1 = all ranks hold it together.

    Raises:
        UserError: hsdp, and machines have different numbers of processes.
    """
    if chosen != "hsdp":
        return 1
    if world.size % world.local_size or world.rank % world.local_size != world.local_rank:
        raise UserError(
            f"trainer.strategy: hsdp needs the same number of processes on every machine; {world.size} processes, of which this one has "
            f"{world.local_size} on its machine, are not that. Use fsdp2"
        )
    return world.nodes


_COMPARED = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose training with bf16 gathers was compared with fp32 gathers."""


def gathers_bf16(precision: settings.Precision, *, rounded: bool, compiled: bool, family: str) -> bool:
    """Whether a sharded student's linears are gathered as bf16, which gives the numbers of an fp32 gather up to rounding.

    Args:
        precision: The trainer's; autocast makes bf16 copies of a linear's weight under bf16-mixed.
        rounded: Whether weights are rounded in the forward pass, which must see the master weights.
        compiled: Whether layers are compiled: each further unit in a layer would cut it into parts.
        family: The model type; other families than those that were compared may read a linear's weight outside autocast.
    """
    return precision == "bf16-mixed" and not rounded and not compiled and family in _COMPARED


def lightning_strategy(chosen: settings.ChosenStrategy, world: "World") -> "Strategy | Literal['auto']":
    """Lightning's strategy object. The process groups are already open (``world.connect``) and stay open."""
    # here and not above: the plan chooses strategies without loading Lightning
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    if world.size == 1:
        return "auto"
    if shards(chosen, world):
        # Its own default puts nodes in the first place and tensor parallelism inside a node. The mesh of hsdp is ours (``sharding.shard``).
        # Lightning needs both sizes: one mesh dimension with all ranks, and no tensor parallelism.
        return ModelParallelStrategy(data_parallel_size=world.size, tensor_parallel_size=1, timeout=COLLECTIVE_TIMEOUT)
    # Every parameter gets a gradient in each step (``RoundedWeight`` attaches unused scales), so none is searched for. Buffers need no
    # broadcast: hooks change them alike on every rank. Buckets as views save a second copy of all gradients.
    return DDPStrategy(find_unused_parameters=False, broadcast_buffers=False, gradient_as_bucket_view=True, timeout=COLLECTIVE_TIMEOUT)
