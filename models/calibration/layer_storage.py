"""Storage of decoder layers while they are not worked on: host memory, or files for models larger than host memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from ..folder.safetensors_write import write_safetensors
from ..folder.streaming import fill, materialize_buffers, parameter_places, place, register, trim_host
from ..folder.weights import WeightFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Shelf(Protocol):
    """Brings the weights of one layer to the device and stores them again."""

    def bring(self, layer: nn.Module) -> None:
        """Puts the layer's parameters on the device, in fp32."""
        ...

    def put_away(self, layer: nn.Module, extra: dict[str, Tensor]) -> dict[str, Tensor]:
        """Moves the layer's current parameters and ``extra`` from the device to the storage; returns the stored ``extra``."""
        ...

    def close(self) -> None:
        """Moves everything outside the layers back to the CPU."""
        ...


class MemoryShelf:
    """Keeps the whole model in host memory and moves one layer at a time to the device.

    Args:
        model: Real weights, fp32.
        layers: Its decoder layers.
        device: Device of the work. Everything outside the layers moves there immediately.
    """

    def __init__(self, model: "PreTrainedModel", layers: Sequence[nn.Module], device: torch.device) -> None:
        self._model, self._device = model, device
        place(model, device, skip=_parameters_of(layers))

    def bring(self, layer: nn.Module) -> None:
        layer.to(self._device)

    def put_away(self, layer: nn.Module, extra: dict[str, Tensor]) -> dict[str, Tensor]:
        layer.to("cpu")
        # the C library keeps freed memory of a layer's size otherwise, and the process would seem to grow layer by layer
        trim_host()
        return {name: tensor.cpu() for name, tensor in extra.items()}

    def close(self) -> None:
        place(self._model, "cpu")


class FileShelf:
    """Reads layers from the model's files and writes them to new files, which are memory-mapped, so that memory holds one layer.

    Args:
        model: On the meta device, from ``empty_model``; its parameters become views of the new files.
        layers: Its decoder layers.
        files: The files of the model's weights.
        folder: An existing folder for the new files, about 5 bytes per weight; they must exist as long as the model is used.
        device: As for ``MemoryShelf``.
    """

    def __init__(
        self, model: "PreTrainedModel", layers: Sequence[nn.Module], files: WeightFiles, folder: Path, device: torch.device
    ) -> None:
        self._model, self._files, self._folder, self._device = model, files, folder, device
        self._written = 0
        # everything outside the layers is used in every forward pass, so it is read once and stays
        _fill_around(model, layers, files, device)

    def bring(self, layer: nn.Module) -> None:
        # from the file at each visit, since the layer was never in memory before
        fill(self._model, self._files, dtype=torch.float32, device=self._device, inside=layer)

    def put_away(self, layer: nn.Module, extra: dict[str, Tensor]) -> dict[str, Tensor]:
        from safetensors import safe_open

        own = {id(parameter) for parameter in layer.parameters()}
        # per parameter all its places (module, attribute, full name); a tied one is written once, under its first name
        places = [found for found in parameter_places(self._model) if id(getattr(found[0][0], found[0][1])) in own]
        file = self._folder / f"{self._written:05d}.safetensors"
        self._written += 1
        write_safetensors(file, {found[0][2]: getattr(found[0][0], found[0][1]) for found in places} | extra)
        # the parameters become views of the mapped file, whose pages the system can drop when memory is short
        with safe_open(file, framework="pt") as mapped:
            for found in places:
                register(found, mapped.get_tensor(found[0][2]))
            kept = {name: mapped.get_tensor(name) for name in extra}
        trim_host()
        return kept

    def close(self) -> None:
        place(self._model, "cpu")


def _fill_around(model: "PreTrainedModel", layers: Sequence[nn.Module], files: WeightFiles, device: torch.device) -> None:
    """Read what is outside the layers, with the buffers that are in no file, such as rotary frequencies."""
    inside = _parameters_of(layers)
    around = nn.ParameterList([parameter for parameter in model.parameters() if id(parameter) not in inside])
    fill(model, files, dtype=torch.float32, device=device, inside=around)
    materialize_buffers(model, device)


class ReadShelf:
    """Reads layers from the model's files and drops them again: memory holds one layer, and nothing is written.

    Args:
        model: On the meta device, from ``empty_model``. Everything outside the layers is read immediately and stays.
        layers: Its decoder layers.
        files: The files of the model's weights.
        device: Device of the work.
    """

    def __init__(self, model: "PreTrainedModel", layers: Sequence[nn.Module], files: WeightFiles, device: torch.device) -> None:
        self._model, self._files, self._device = model, files, device
        _fill_around(model, layers, files, device)

    def bring(self, layer: nn.Module) -> None:
        """Puts the layer's parameters on the device, in fp32."""
        fill(self._model, self._files, dtype=torch.float32, device=self._device, inside=layer)

    def drop(self, layer: nn.Module) -> None:
        """Frees them again."""
        own = {id(parameter) for parameter in layer.parameters()}
        for found in parameter_places(self._model):
            parameter = getattr(found[0][0], found[0][1])
            if id(parameter) in own:
                register(found, torch.empty_like(parameter, device="meta"))
        trim_host()


def _parameters_of(layers: Sequence[nn.Module]) -> set[int]:
    return {id(parameter) for layer in layers for parameter in layer.parameters()}
