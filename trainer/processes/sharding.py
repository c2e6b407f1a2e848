"""FSDP2: every rank holds some rows of each parameter, and sees a layer whole only while it computes.

Optimizer, hooks and checkpoints work on plain tensors: ``local`` gives a rank's own rows (everything, where nothing is sharded), and
``ParameterViews`` are parameters on that memory. AdamW is elementwise, so stepping the rows is stepping the whole.

The all-gather stays fp32, also under bf16-mixed: fake quantization must see the master weights, or what is trained is not what is
stored; autocast then makes the bf16 copies, as it does under DDP.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...models.families import decoder_layers
from ...models.folder.streaming import parameter_places, register

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


def local(tensor: "Tensor | Rows") -> Tensor:
    """This rank's rows of a sharded tensor, sharing its memory; any other tensor itself. Outside autograd."""
    if isinstance(tensor, Rows):
        return tensor.tensor
    own = tensor.detach()
    return own.to_local() if isinstance(own, DTensor) else own


@dataclass(frozen=True)
class Rows:
    """This rank's rows of something that lies as a sharded parameter does: a mask, or a moment."""

    tensor: Tensor
    """The rows, on any device."""
    first: int
    last: int
    """Past the last row."""
    shape: torch.Size
    """Of the whole."""


def row_range(tensor: Tensor | Rows) -> tuple[int, int] | None:
    """First and past-the-last row (of dimension 0) that this rank holds; None when it holds them all."""
    if isinstance(tensor, Rows):
        return tensor.first, tensor.last
    if not isinstance(tensor, DTensor):
        return None
    rows, mesh = tensor.shape[0], tensor.device_mesh
    share = -(-rows // mesh.size())
    start = min(mesh.get_local_rank() * share, rows)
    stop = min(start + share, rows)
    assert stop - start == local(tensor).shape[0], "FSDP2 shards rows as torch.chunk does"
    return start, stop


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on every rank (a collective when it is sharded)."""
    own = tensor.detach()
    return own.full_tensor() if isinstance(own, DTensor) else own


def like(rows: Tensor, weight: Tensor) -> Tensor | Rows:
    """``rows``, this rank's part of a tensor of ``weight``'s shape, with its place in the whole (itself where nothing is sharded)."""
    held = row_range(weight)
    return rows if held is None else Rows(rows, *held, weight.shape)


def gathered(rows: Tensor, weight: Tensor) -> Tensor:
    """The whole tensor of which every rank holds the ``rows`` that it holds of ``weight`` (a collective when that is sharded)."""
    if not isinstance(weight, DTensor):
        return rows
    placed = DTensor.from_local(rows, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride())
    return placed.full_tensor()


def own_rows(full: Tensor, weight: Tensor) -> Tensor:
    """The rows of ``full`` that this rank holds of ``weight``, in memory of their own where that is sharded."""
    rows = row_range(weight)
    return full if rows is None else full[rows[0] : rows[1]].clone()


class ParameterViews:
    """The trainable parameters of a student as parameters in plain memory: themselves, or this rank's rows.

    FSDP2 leaves gradients on the sharded parameters; ``receive_gradients`` hands them over before the optimizer steps.
    """

    def __init__(self, student: nn.Module) -> None:
        self.owners: dict[str, nn.Parameter] = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self.views: dict[str, nn.Parameter] = {
            name: nn.Parameter(local(p)) if isinstance(p, DTensor) else p for name, p in self.owners.items()
        }
        self.sharded = any(isinstance(p, DTensor) for p in self.owners.values())

    def receive_gradients(self) -> None:
        """Give every view its parameter's gradient (shared memory)."""
        for name, view in self.views.items():
            owner = self.owners[name]
            if view is not owner:
                view.grad = None if owner.grad is None else local(owner.grad)

    def drop_gradients(self) -> None:
        """No gradient anywhere."""
        for parameters in (self.owners, self.views):
            for parameter in parameters.values():
                parameter.grad = None


def parameter_of(optimizer: torch.optim.Optimizer, weight: Tensor) -> Tensor | None:
    """The optimizer's parameter that lives in ``weight``'s memory; None when this rank has none of its rows, or it is not trained."""
    address = local(weight).data_ptr()
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return next((p for p in parameters if p is weight or (p.data_ptr() == address and address != 0)), None)


def shard(step: nn.Module, student: "PreTrainedModel", mesh: "DeviceMesh", materialize: Callable[[], None] | None = None) -> None:
    """Spread ``student`` over the ranks of ``mesh``, in place: a unit a decoder layer, and one of everything else.

    Args:
        step: The module whose forward runs the student; gathering starts there, so the head may be used outside the backbone.
        student: Whole on every rank, or on the meta device.
        mesh: One dimension, all ranks.
        materialize: Fills the rows of a student on the meta device, after they have been allocated.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in decoder_layers(student):
        fully_shard(layer, mesh=mesh)
    fully_shard(step, mesh=mesh)
    if materialize is not None:
        materialize()
    # Rows that do not divide evenly are padded on first use, which moves them: that must be over before anyone holds a view.
    state: Any = step._get_fsdp_state()  # pyright: ignore[reportCallIssue] - fully_shard gave the module another class
    state._lazy_init()


def allocate(student: nn.Module, device: torch.device) -> None:
    """Uninitialised memory for every parameter on the meta device, of a sharded one for this rank's rows; buffers are left alone."""
    for places in parameter_places(student):
        module, key, _ = places[0]
        parameter = getattr(module, key)
        if parameter.is_meta:
            register(places, torch.empty_like(parameter, device=device))


def skeleton_of(student: "PreTrainedModel") -> "PreTrainedModel":
    """A copy of the student without weights (parameters on the meta device, ties kept): what ``gather_into`` fills."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in student.parameters()
    }
    return copy.deepcopy(student, memo)


def gather_into(skeleton: "PreTrainedModel", student: "PreTrainedModel", *, keep: bool) -> None:
    """Gather the sharded ``student`` tensor by tensor: ranks that ``keep`` fill ``skeleton`` with it on the CPU, the others drop it."""
    places = {name: hung for hung in parameter_places(skeleton) for _, _, name in hung}
    for name, parameter in student.named_parameters():
        full = whole(parameter)
        if keep:
            # a copy in memory of its own: what was gathered may be a part of padded memory
            register(places[name], torch.empty_like(full, device="cpu").copy_(full))
