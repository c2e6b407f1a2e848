"""Gram matrices, on calibration text, of what matrices read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .masked_run import MaskedRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Text = Sequence[Mapping[str, Tensor]]
BUDGET = 4 * 2**30
"""Bytes of Gram matrices that are summed in one pass over the text; the others wait for the next pass."""


class Grams:
    """Iterates over (name, Gram matrix) of linears: ``G = sum_t a_t a_t^T`` of what they read, fp64 [in, in]."""

    def __init__(self, model: "PreTrainedModel", text: Text, names: Sequence[str]) -> None:
        """Nothing is read before the first matrix is asked for.

        Args:
            model: The model.
            text: Calibration text; read once for as many matrices as ``BUDGET`` holds.
            names: Full names of the linears, all of which read the same number of channels.
        """
        self._model, self._text, self._names = model, text, list(names)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the matrices in the order of the names; each is freed when the next group begins."""
        left = self._names
        while left:
            weight: Any = self._model.get_submodule(left[0]).weight
            width = max(weight.shape)
            count = max(1, BUDGET // (8 * width * width))
            group, left = left[:count], left[count:]
            yield from self._summed(group).items()

    def _summed(self, names: Sequence[str]) -> dict[str, Tensor]:
        run, sums, hooks = MaskedRun(), dict[str, Tensor](), ExitStack()

        def adder(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def add(_module: nn.Module, given: tuple[Any, ...]) -> None:
                rows = run.rows(given[0]).double()
                sums[name] = sums[name].addmm_(rows.T, rows) if name in sums else rows.T @ rows

            return add

        for name in names:
            hooks.callback(self._model.get_submodule(name).register_forward_pre_hook(adder(name)).remove)
        run.read(self._model, self._text, hooks)
        return sums
