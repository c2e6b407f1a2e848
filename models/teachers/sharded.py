"""A teacher sharded over all processes by FSDP2: each holds some rows of every weight of the decoder layers.

A layer is gathered just before its forward pass and dropped after it, in all processes at the same time, each with its own batch.
Embedding, final norm and head are whole in every process, because the head is used outside the backbone. There is no backward pass, so
nothing stays gathered.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..common.errors import UserError
from ..families import decoder_layers
from ..folder.streaming import fill, open_files, parameter_places, place, register, stored_name
from ..folder.weights import WeightFiles

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


def sharded_model(path: str | Path, *, dtype: torch.dtype, device: torch.device | str, revision: str | None = None) -> "PreTrainedModel":
    """A frozen causal language model in eval mode of which each process holds a share; each process reads only its own rows.

    All processes must call this function, and then the model equally often. The model cannot move afterwards.

    Args:
        path: Model folder or hub id, on a disk that every process can read.
        dtype: Dtype of weights, of their exchange between processes, and of hidden states.
        device: This process's device.
        revision: Hub revision.

    Raises:
        UserError: see ``load_model``; or no process group is open, or the folder cannot be read tensor by tensor (``can_stream``).
    """
    from torch.distributed import is_initialized
    from torch.distributed.fsdp import fully_shard

    if not is_initialized():
        raise UserError("teacher.placement: sharded needs several processes; start with torchrun (decoct launch), or use replicated")
    device = torch.device(device)
    with open_files(path, revision, dtype) as (model, files):
        layers = decoder_layers(model) if model is not None else []
        if model is None or files is None or not layers:
            raise UserError(
                f"teacher.placement: sharded: {path} cannot be read tensor by tensor, or its decoder layers are not found; use a model of "
                "the families llama, mistral, qwen2 or qwen3, or placement: offloaded"
            )
        model.requires_grad_(False)
        # a mesh of the teacher's own: under DDP the student has none
        mesh = _all_processes(device)
        inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # a root without weights of its own: it makes the layers share streams, so that the next layer is gathered while one computes
        around = {parameter for parameter in model.parameters() if id(parameter) not in inside}
        fully_shard(model.base_model, mesh=mesh, reshard_after_forward=True, ignored_params=around)
        for layer in layers:
            _read_rows(model, layer, files, device)
        # what is left on the meta device: embedding, final norm and head, whole in every process
        fill(model, files, dtype=dtype, device=device)
        place(model, device)
    return model.eval()


def _all_processes(device: torch.device) -> "DeviceMesh":
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (get_world_size(),), mesh_dim_names=("teacher",))


@torch.no_grad()
def _read_rows(model: nn.Module, layer: nn.Module, files: WeightFiles, device: torch.device) -> None:
    """Allocates and fills this process's rows of every weight in ``layer``, which is on the meta device."""
    own = {id(parameter) for parameter in layer.parameters()}
    for places in parameter_places(model):
        parameter: Any = getattr(places[0][0], places[0][1])
        if id(parameter) in own:
            rows = _own_rows(parameter)
            # a DTensor with this process's rows alone
            here = torch.empty_like(parameter, device=device)
            _local(here).copy_(files.read_as(stored_name(places, files), parameter.dtype, rows))
            register(places, here)


def _local(tensor: Any) -> Tensor:
    return tensor.to_local()


def _own_rows(parameter: Any) -> slice:
    """Rows of the first dimension that this process holds; FSDP2 splits them as ``torch.chunk`` does."""
    rows, mesh = parameter.shape[0], parameter.device_mesh
    share = -(-rows // mesh.size())
    # the last processes may hold fewer rows, or none
    start = min(mesh.get_local_rank() * share, rows)
    stop = min(start + share, rows)
    # another way of splitting in a later release must not mix up rows
    assert stop - start == _local(parameter).shape[0]
    return slice(start, stop)
