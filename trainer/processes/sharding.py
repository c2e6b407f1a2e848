"""Sharding by FSDP2: every rank holds some rows of each parameter, and a layer is whole only while it computes.

Optimizer, hooks and checkpoints work on plain tensors: ``local`` gives a rank's own rows (all of them without sharding), and
``ParameterViews`` are parameters on that memory. AdamW is elementwise, so stepping the rows equals stepping the whole.

Under hsdp every machine holds all rows once: the mesh has two dimensions, copies x rows. Weights are gathered inside a machine, and
gradients are summed between machines once per step.

Where weights are rounded in the forward pass, the all-gather is fp32 also under bf16-mixed: fake quantization must see the master weights,
because the rounding in training must be that of the stored weights. Elsewhere autocast would make bf16 copies of the linears' gathered
weights, so these are gathered as bf16, which gives the same numbers up to rounding (``strategy.gathers_bf16``). Everything else stays
fp32: norms, whose products autocast leaves in fp32, and embedding and head (law 2, docs/architecture.md).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...models.families import decoder_layers, is_plain_linear
from ...models.folder.streaming import parameter_places, register

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


def local(tensor: "Tensor | Rows") -> Tensor:
    """This rank's rows of a sharded tensor, in the same memory; any other tensor itself. Without an autograd graph."""
    if isinstance(tensor, Rows):
        return tensor.tensor
    own = tensor.detach()
    return own.to_local() if isinstance(own, DTensor) else own


@dataclass(frozen=True)
class Rows:
    """This rank's rows of a tensor that is sharded as a parameter is: a mask, or a moment."""

    tensor: Tensor
    """The rows, on any device."""
    first: int
    last: int
    """Past the last row."""
    shape: torch.Size
    """Shape of the whole tensor."""
    copy: int = 0
    """``copy_of`` the parameter."""


def row_range(tensor: Tensor | Rows) -> tuple[int, int] | None:
    """First and past-the-last row (of dimension 0) that this rank holds; None if it holds all rows."""
    if isinstance(tensor, Rows):
        return tensor.first, tensor.last
    if not isinstance(tensor, DTensor):
        return None
    rows, mesh = tensor.shape[0], tensor.device_mesh
    # the last dimension of the mesh; one before it counts copies of the rows
    at = mesh.ndim - 1
    # torch.chunk: equal shares rounded up, so the last ranks may hold fewer rows or none
    share = -(-rows // mesh.size(at))
    start = min(mesh.get_local_rank(at) * share, rows)
    stop = min(start + share, rows)
    assert stop - start == local(tensor).shape[0], "FSDP2 shards rows as torch.chunk does"
    return start, stop


def copy_of(tensor: Tensor | Rows) -> int:
    """Which copy of its rows this rank holds, counted from 0; more than one exists under hsdp alone."""
    if isinstance(tensor, Rows):
        return tensor.copy
    mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
    return mesh.get_local_rank(0) if mesh is not None and mesh.ndim > 1 else 0


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on every rank (a collective operation if it is sharded)."""
    own = tensor.detach()
    return own.full_tensor() if isinstance(own, DTensor) else own


def like(rows: Tensor, weight: Tensor) -> Tensor | Rows:
    """``rows``, this rank's part of a tensor with ``weight``'s shape, together with its place in the whole; ``rows`` if not sharded."""
    held = row_range(weight)
    return rows if held is None else Rows(rows, *held, weight.shape, copy_of(weight))


def gathered(rows: Tensor, weight: Tensor) -> Tensor:
    """The whole tensor of which every rank holds ``rows``, the same rows as of ``weight`` (a collective operation if sharded)."""
    if not isinstance(weight, DTensor):
        return rows
    # run_check would add a collective of its own. Shape and stride are given, since with uneven rows a rank cannot derive them from its own
    placed = DTensor.from_local(rows, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride())
    return placed.full_tensor()


def own_rows(full: Tensor, weight: Tensor) -> Tensor:
    """The rows of ``full`` that this rank holds of ``weight``; a copy if ``weight`` is sharded."""
    rows = row_range(weight)
    return full if rows is None else full[rows[0] : rows[1]].clone()


class ParameterViews:
    """The trainable parameters of a student as plain parameters: themselves, or this rank's rows.

    FSDP2 puts gradients on the sharded parameters; ``receive_gradients`` passes them to the views before the optimizer steps.
    """

    def __init__(self, student: nn.Module) -> None:
        # named_parameters has a tied tensor once, under its first name, which is also its name in checkpoints
        self.owners: dict[str, nn.Parameter] = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self.views: dict[str, nn.Parameter] = {
            name: nn.Parameter(local(p)) if isinstance(p, DTensor) else p for name, p in self.owners.items()
        }
        meshes = [p.device_mesh for p in self.owners.values() if isinstance(p, DTensor)]
        self.sharded = bool(meshes)
        self.copies = meshes[0].size(0) if meshes and meshes[0].ndim > 1 else 1
        """Ranks that hold the same rows of a sharded parameter."""

    def receive_gradients(self) -> None:
        """Gives every view its parameter's gradient, in the same memory."""
        for name, view in self.views.items():
            owner = self.owners[name]
            if view is not owner:
                # the same memory: scaling and clipping act on the views, and no second copy of the gradients is held
                view.grad = None if owner.grad is None else local(owner.grad)

    def drop_gradients(self) -> None:
        """Drops all gradients."""
        # both: a view that kept a gradient would keep its memory alive through the next forward pass
        for parameters in (self.owners, self.views):
            for parameter in parameters.values():
                parameter.grad = None


def parameter_of(optimizer: torch.optim.Optimizer, weight: Tensor) -> Tensor | None:
    """The optimizer's parameter in ``weight``'s memory; None if this rank has none of its rows, or it is not trained."""
    # by address, because the optimizer has views of sharded weights; 0 is the address of all empty tensors
    address = local(weight).data_ptr()
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return next((p for p in parameters if p is weight or (p.data_ptr() == address and address != 0)), None)


@cache
def mesh_of_copies(device_type: str, copies: int, ranks: int) -> "DeviceMesh":
    """The mesh of hsdp: ``copies`` machines with ``ranks`` processes each. Every process must call this; made once."""
    from torch.distributed.device_mesh import init_device_mesh

    # torchrun numbers the ranks of a machine one after the other, and so does the last dimension
    return init_device_mesh(device_type, (copies, ranks), mesh_dim_names=("copies", "rows"))


def shard(
    step: nn.Module,
    student: "PreTrainedModel",
    mesh: "DeviceMesh",
    materialize: Callable[[], None] | None = None,
    *,
    bf16: bool = False,
) -> None:
    """Shards ``student`` over the ranks of ``mesh``, in place: one unit per decoder layer, and one for everything else.

    Args:
        step: The module whose forward runs the student; weights are gathered there, so the head may be used outside the backbone.
        student: Whole on every rank, or on the meta device.
        mesh: Mesh of one dimension with all ranks, or of two: copies x rows.
        materialize: Allocates and fills the rows of a student on the meta device.
        bf16: Gather the weights of the layers' linears as bf16. Gradients are summed over ranks in fp32 in any case.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # inputs stay as they are: autocast rounds those of products alone, and the stream between the layers is fp32
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers: list[Any] = decoder_layers(student)
    # the smallest first: fully_shard leaves out what is already sharded, so the last call gets embedding, final norm and head
    for layer in layers:
        # a unit has one dtype, so each module that is no linear becomes a unit of its own, of a few kilobytes, which stays gathered until
        # its backward pass
        for module in [m for m in layer.modules() if _is_other(m)] if bf16 else ():
            fully_shard(module, mesh=mesh, reshard_after_forward=False)
        fully_shard(layer, mesh=mesh, mp_policy=low if bf16 else MixedPrecisionPolicy())
    fully_shard(step, mesh=mesh)
    # the next unit of the backward pass is fetched while one computes: with small units in between, that would not be the next layer
    for before, layer in pairwise(layers if bf16 else ()):
        layer.set_modules_to_backward_prefetch([before])
    if materialize is not None:
        materialize()
    # FSDP2 pads rows that do not divide evenly at first use, which moves them in memory: do it now, before there are views of them
    state: Any = step._get_fsdp_state()  # pyright: ignore[reportCallIssue] - fully_shard gave the module another class
    state._lazy_init()


def reshard(step: nn.Module) -> None:
    """Frees the weights that stay gathered from a forward to its backward pass, after a forward without a backward.

    Args:
        step: What ``shard`` was given; nothing happens if it is not sharded.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in step.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _is_other(module: nn.Module) -> bool:
    """Whether a module has parameters of its own that are not those of a linear."""
    return next(module.parameters(recurse=False), None) is not None and not is_plain_linear(module)


def allocate(student: nn.Module, device: torch.device) -> None:
    """Allocates memory for every parameter on the meta device (for this rank's rows if it is sharded); buffers are not changed."""
    for places in parameter_places(student):
        module, key, _ = places[0]
        parameter = getattr(module, key)
        if parameter.is_meta:
            # for a DTensor this allocates the rank's own rows alone; all places of a tied tensor get the same parameter
            register(places, torch.empty_like(parameter, device=device))


def skeleton_of(student: "PreTrainedModel") -> "PreTrainedModel":
    """A copy of the student without weights (parameters on the meta device, ties kept), for ``gather_into``."""
    # deepcopy takes the meta parameters from the memo instead of copying the real ones
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in student.parameters()
    }
    return copy.deepcopy(student, memo)


def gather_into(skeleton: "PreTrainedModel", student: "PreTrainedModel", *, keep: bool) -> None:
    """Gathers the sharded ``student`` tensor by tensor; ranks with ``keep`` fill ``skeleton`` with it on the CPU, others drop it."""
    places = {name: hung for hung in parameter_places(skeleton) for _, _, name in hung}
    for name, parameter in student.named_parameters():
        # a collective: every rank calls it for every parameter in the same order, also the ranks that drop the result. It takes one
        # tensor at a time, so no device holds more than its share and one whole parameter
        full = whole(parameter)
        if keep:
            # copied, because the gathered tensor may be a view of larger, padded memory
            register(places[name], torch.empty_like(full, device="cpu").copy_(full))
