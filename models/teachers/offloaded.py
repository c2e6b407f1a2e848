"""A teacher with its decoder layers in host memory, of which one at a time is on the device.

The weights of a layer are copied to the device before it runs and dropped afterwards. With CUDA the next layer's weights are copied at the
same time (pinned memory, separate stream), so the device holds at most two layers. Embedding, final norm and head stay on the device.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..common.errors import UserError
from ..families import decoder_layers
from ..folder.loading import load_model
from ..folder.streaming import fill, open_files, place

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def offloaded_model(path: str | Path, *, dtype: torch.dtype, device: torch.device | str, revision: str | None = None) -> "PreTrainedModel":
    """A frozen causal language model in eval mode that runs on ``device`` with its decoder layers in host memory.

    It cannot move afterwards and has no backward pass.

    Raises:
        UserError: see ``load_model``; or the decoder layers are not found.
    """
    device = torch.device(device)
    with open_files(path, revision, dtype) as (skeleton, files):
        model = skeleton if skeleton is not None else load_model(path, dtype=dtype, revision=revision)
        layers = decoder_layers(model)
        if not layers:
            raise UserError(f"teacher.placement: offloaded: no list of decoder layers in {path}; use placement: replicated")
        if files is not None:
            # layer by layer into host memory; then all other parameters, which are still on the meta device, onto the device
            for layer in layers:
                fill(model, files, dtype=dtype, device="cpu", inside=layer)
            fill(model, files, dtype=dtype, device=device)
        _place_around(model, layers, device)
    model.requires_grad_(False).eval()
    # kept alive by the hooks that it registers
    Offloading(layers, device)
    return model


def _place_around(model: nn.Module, layers: list[nn.Module], device: torch.device) -> None:
    """Moves everything but the layers' parameters."""
    # by identity: a tied weight has several names
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    place(model, device, skip=inside)


class Offloading:
    """Brings the weights of layers to ``device`` while they run; installed by its constructor, kept alive by the layers' hooks.

    Args:
        layers: The layers in the order in which they run; their parameters are on the CPU.
        device: Device on which they run. The CPU is allowed for tests (weights are copied there too).
    """

    def __init__(self, layers: list[nn.Module], device: torch.device) -> None:
        self._device = device
        # a stream of its own: copies run beside the computation on the current one
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # the same Parameter objects throughout; only their data changes, so names and hooks stay valid
        self._parameters = [list(layer.parameters()) for layer in layers]
        self._host: list[list[Tensor]] = []
        self._coming: dict[int, tuple[list[Tensor], torch.cuda.Event | None]] = {}
        for index, layer in enumerate(layers):
            self._host.append([self._pin(parameter.detach()) for parameter in self._parameters[index]])
            # drops the unpinned weights at once, so that the host never holds two copies of more than one layer
            self._leave(index)
            layer.register_forward_pre_hook(lambda *_, index=index: self._enter(index))
            layer.register_forward_hook(lambda *_, index=index: self._leave(index), always_call=True)

    def _pin(self, weight: Tensor) -> Tensor:
        # only pinned memory can be copied without blocking the host
        return weight.pin_memory() if self._stream is not None else weight

    def _enter(self, index: int) -> None:
        """Gives layer ``index`` its weights, and starts the copy of the next layer's."""
        # on its way since the layer before began; the first layer of a pass is fetched now
        weights, arrived = self._coming.pop(index, None) or self._send(index)
        if arrived is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(arrived)
            for weight in weights:
                # without this its memory could be given to the next copy while this layer still reads it
                weight.record_stream(here)
        for parameter, weight in zip(self._parameters[index], weights):
            parameter.data = weight
        # not on a CPU, where nothing runs beside the computation
        if self._stream is not None and index + 1 < len(self._parameters):
            self._coming[index + 1] = self._send(index + 1)

    def _leave(self, index: int) -> None:
        """Sets the weights in host memory again, which drops those on the device."""
        for parameter, weight in zip(self._parameters[index], self._host[index]):
            parameter.data = weight

    def _send(self, index: int) -> tuple[list[Tensor], Any]:
        if self._stream is None:
            # copy=True: on the CPU ``to`` would return the host's tensor itself, and a test of dropping would prove nothing
            return [weight.to(self._device, copy=True) for weight in self._host[index]], None
        with torch.cuda.stream(self._stream):
            weights = [weight.to(self._device, non_blocking=True) for weight in self._host[index]]
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return weights, arrived
