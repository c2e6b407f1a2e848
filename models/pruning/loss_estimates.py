"""How much each weight matters to the loss, to first order: sums of (w dL_n/dw)^2 over the windows n of a text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..axis_map import Axis, Family
from ..sizes import Sizes
from .ranks import Ranks
from .reductions import reduced
from .text_loss import add_gradients

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def windows(batches: Iterable[Mapping[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Batches of one window each, [1, S], of batches [B, S]."""
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            yield {name: values[row : row + 1] for name, values in batch.items()}


class LossEstimates:
    """Sums over windows of (w dL_n/dw)^2 over all that is cut together, L_n being the summed loss of the next tokens of window n.

    The square is taken of each weight in each window before anything is added up (Molchanov et al., arXiv 1906.10771, the importance of
    a set as the sum of that of its weights), so that nothing cancels: the gradient of a text is near zero where a model was trained to a
    minimum on it. Beside other estimates: ``benchmarks/pruning_taylor.py``.
    """

    def __init__(self, model: "PreTrainedModel", family: Family, sizes: Sizes, axes: Sequence[Axis]) -> None:
        """Nothing is computed before the first window.

        Args:
            model: The model, in fp32; ``grad`` of its parameters is overwritten.
            family: Its axis map.
            sizes: Its sizes.
            axes: Axes that are estimated.
        """
        self._model, self._family, self._sizes = model, family, sizes
        places: dict[Axis, int] = {axis: sizes.layers + (axis == "hidden") for axis in axes}
        self.sums: dict[Axis, list[Tensor]] = {
            axis: [torch.zeros(sizes.of(axis), dtype=torch.float64) for _ in range(count)] for axis, count in places.items()
        }
        """Axis -> per layer [size of the axis], fp64 on the CPU; for ``hidden`` last that of what is outside the layers."""

    def add(self, window: Mapping[str, Tensor]) -> Tensor:
        """Adds one window [1, S], and returns the output of the backbone [1, S, hidden]."""
        self._model.zero_grad(set_to_none=True)
        hidden = add_gradients(self._model, window)
        with torch.no_grad():
            for axis, sums in self.sums.items():
                for known, more in zip(sums, reduced(self._model, self._family, self._sizes, axis, _squares), strict=True):
                    known += more
        return hidden

    def add_up(self, ranks: Ranks) -> None:
        """Adds the sums of all processes, each of which has read windows of its own."""
        for sums in self.sums.values():
            for part in sums:
                ranks.sum(part)


def _squares(parameter: Tensor) -> Tensor:
    # no gradient: nothing that was predicted depends on it
    if parameter.grad is None:
        return torch.zeros_like(parameter, dtype=torch.float64)
    return (parameter.double() * parameter.grad.double()).square()
