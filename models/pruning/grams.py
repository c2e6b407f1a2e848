"""Gram matrices, on calibration text, of what matrices read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .masked_run import MaskedRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Text = Sequence[Mapping[str, Tensor]]
BUDGET = 4 * 2**30
"""Bytes of Gram matrices that are summed in one pass over the text; the others wait for the next pass."""
_STRIPES = 8


def _stripes(width: int) -> list[tuple[int, int]]:
    """(first, last + 1) of the bands of rows of a Gram matrix of ``width`` channels."""
    step = max(128, -(-width // _STRIPES))
    return [(start, min(width, start + step)) for start in range(0, width, step)]


def stored_elements(width: int) -> int:
    """Numbers of a Gram matrix that are summed and kept: from its diagonal on, by bands of rows."""
    return sum((stop - start) * (width - start) for start, stop in _stripes(width))


def whole(flat: Tensor, width: int) -> Tensor:
    """The symmetric matrix [width, width] of the bands that ``GramSums`` keeps."""
    full, at = flat.new_zeros(width, width), 0
    for start, stop in _stripes(width):
        size = (stop - start) * (width - start)
        full[start:stop, start:] = flat[at : at + size].view(stop - start, width - start)
        at += size
    return full.triu() + full.triu(1).T


class GramSums:
    """Hooks that sum ``a a^T`` of what some linears read, fp64; only from the diagonal on, which is little more than half the work."""

    def __init__(self, model: "PreTrainedModel", names: Sequence[str], rows: Callable[[Tensor], Tensor]) -> None:
        """Prepares the sums; ``hook`` sets the hooks.

        Args:
            model: The model.
            names: Full names of linears.
            rows: Gives the unmasked tokens [tokens, C] of what a module reads.
        """
        self._model, self._names, self._rows = model, list(names), rows
        self.sums: dict[str, Tensor] = {}
        """Name -> the bands of rows one after the other (``whole``)."""

    def hook(self, hooks: ExitStack) -> None:
        """Sets the hooks, which ``hooks`` takes off again."""
        for name in self._names:
            hooks.callback(self._model.get_submodule(name).register_forward_pre_hook(self._adder(name)).remove)

    def _adder(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_module: nn.Module, given: tuple[Any, ...]) -> None:
            rows = self._rows(given[0]).double()
            width, at = rows.shape[1], 0
            if name not in self.sums:
                self.sums[name] = rows.new_zeros(stored_elements(width))
            for start, stop in _stripes(width):
                size = (stop - start) * (width - start)
                band = self.sums[name][at : at + size].view(stop - start, width - start)
                band.addmm_(rows[:, start:stop].T, rows[:, start:])
                at += size

        return add


def width_of(model: "PreTrainedModel", name: str) -> int:
    """Channels that a projection back to the hidden states reads (FFN or heads), whichever way its weight lies."""
    weight: Any = model.get_submodule(name).weight
    # Conv1D keeps [in, out]
    return weight.shape[1] if isinstance(model.get_submodule(name), nn.Linear) else weight.shape[0]


def groups(model: "PreTrainedModel", names: Sequence[str]) -> Iterator[list[str]]:
    """The names in groups whose sums fit into ``BUDGET``, one at least in each."""
    group, used = list[str](), 0
    for name in names:
        size = 8 * stored_elements(width_of(model, name))
        if group and used + size > BUDGET:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    if group:
        yield group


class Grams:
    """Iterates over (name, Gram matrix) of linears: ``G = sum_t a_t a_t^T`` of what they read, fp64 [in, in]."""

    def __init__(self, model: "PreTrainedModel", text: Text, names: Sequence[str]) -> None:
        """Nothing is read before the first matrix is asked for.

        Args:
            model: The model.
            text: Calibration text; read once for as many matrices as ``BUDGET`` holds.
            names: Full names of the linears.
        """
        self._model, self._text, self._names = model, text, list(names)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the matrices in the order of the names; each group is freed when the next begins."""
        for group in groups(self._model, self._names):
            sums = summed(self._model, self._text, group)
            for name in group:
                yield name, whole(sums[name], width_of(self._model, name))


@torch.no_grad()
def summed(model: "PreTrainedModel", text: Text, names: Sequence[str]) -> dict[str, Tensor]:
    """One pass over the text: name -> bands of its Gram matrix."""
    run, hooks = MaskedRun(), ExitStack()
    sums = GramSums(model, names, run.rows)
    sums.hook(hooks)
    run.read(model, text, hooks)
    return sums.sums
