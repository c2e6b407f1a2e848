"""Hidden states of a parent at the layers that a student keeps, computed layer by layer; of a model in files, one layer is in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..calibration.layer_storage import ReadShelf
from ..calibration.replay import Advance, Batch, Remedies, Replay
from ..families import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REMEDIES = Remedies(linear="leave 'local' out", layer="leave 'local' out", overflow="Take an earlier checkpoint")


@dataclass(frozen=True)
class States:
    """What one kept layer of a parent reads, and what its student's layer learns; a tensor [B, S, hidden] fp32 on the CPU per batch."""

    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    layer: int
    """The parent's layer that gives the outputs."""


class ParentLayers:
    """The decoder layers of a parent.

    Args:
        model: The parent, whole or, with ``shelf``, with layers that are read when they are needed.
        device: Device of the work.
        shelf: Reads the layers; None = they are there.
    """

    def __init__(self, model: "PreTrainedModel", device: torch.device, shelf: ReadShelf | None = None) -> None:
        self._model, self._device, self._shelf = model, device, shelf

    def states(self, kept: Sequence[int], batches: Sequence[Batch], advance: Advance = lambda tokens: None) -> Iterator[States]:
        """Yields the states at each layer of ``kept`` (ascending). The outputs are those after the dropped layers that follow it.

        Args:
            kept: Layers of the parent that the student has.
            batches: The text.
            advance: Called with the tokens that passed a layer.
        """
        layers = decoder_layers(self._model)
        replay = Replay(self._model, layers, batches, self._device, _REMEDIES)
        self._model.eval()
        # dropped layers before the first kept one are part of what that one reads
        ends = [*(following - 1 for following in kept[1:]), len(layers) - 1]
        inputs: list[Tensor] | None = None
        with torch.no_grad():
            for index, layer in enumerate(layers):
                if self._shelf is not None:
                    self._shelf.bring(layer)
                if index in kept:
                    inputs = replay.held() if index else replay.first_inputs()
                replay.finish(index, advance)
                if self._shelf is not None:
                    self._shelf.drop(layer)
                if inputs is not None and index in ends:
                    yield States(inputs, replay.held(), index)
