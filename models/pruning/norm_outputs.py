"""What the norms of a model read and give on calibration text, and the factor that brings a cut model's norm nearest to its parent's."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..axis_map import Family
from ..sizes import Sizes
from .kept import Kept
from .masked_run import MaskedRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Text = Sequence[Mapping[str, Tensor]]
TOKENS = 1024
"""Tokens of which the outputs of the norms are kept; energies are of all tokens."""


def hidden_norms(family: Family, kept: Kept) -> dict[str, str]:
    """Name in the parent -> name in the student, of each RMSNorm over the hidden channels."""
    inside = [norm for norm in family.rms_norms if family.layer[f"{norm}.weight"][0] == "hidden"]
    names = {
        f"{family.layers_path}.{layer}.{norm}": f"{family.layers_path}.{position}.{norm}"
        for position, layer in enumerate(kept.layers)
        for norm in inside
    }
    return names | {family.final_norm: family.final_norm}


class NormOutputs:
    """Sums and outputs of some norms of one model, by name; the text is read once."""

    def __init__(self, model: "PreTrainedModel", text: Text, names: Sequence[str], channels: Sequence[int] | None = None) -> None:
        """Reads the text.

        Args:
            model: The model.
            text: Calibration text.
            names: Its norms.
            channels: The channels of the outputs that are kept; None = all.
        """
        self.energies: dict[str, Tensor] = {}
        """[hidden] fp64: sum_t x_tc^2 of what a norm reads."""
        self._outputs: dict[str, list[Tensor]] = {name: [] for name in names}
        run, hooks = MaskedRun(), ExitStack()

        def adder(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
            def add(_module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
                squares = run.rows(given[0]).double().square().sum(0)
                self.energies[name] = self.energies[name] + squares if name in self.energies else squares
                left = TOKENS - sum(map(len, self._outputs[name]))
                # the same tokens in every model, since text and masks are the same
                rows = run.rows(output)[: max(0, left)]
                self._outputs[name].append(rows if channels is None else rows[:, torch.tensor(channels, device=rows.device)])

            return add

        for name in names:
            hooks.callback(model.get_submodule(name).register_forward_hook(adder(name)).remove)
        run.read(model, text, hooks)

    def outputs(self, name: str) -> Tensor:
        """[tokens, channels] fp64: what a norm gives, of the first ``TOKENS`` tokens."""
        return torch.cat(self._outputs[name]).double()

    def ratio(self, name: str, kept: Kept, before: Sizes, after: Sizes) -> float:
        """sqrt(mean square of the kept channels / mean square of all) of what a norm of the parent reads.

        The student's norm divides by the root of the first, the parent's by that of the second: the factor makes up for it.
        """
        squares = self.energies[name]
        inner = squares[torch.tensor(kept.hidden, device=squares.device)].sum() / after.hidden
        whole = squares.sum() / before.hidden
        return float((inner / whole.clamp(min=torch.finfo(torch.float64).tiny)).sqrt())


def nearest(options: Sequence[float], own: Tensor, wanted: Tensor) -> int:
    """Position of the factor with the least ``||factor x own - wanted||^2``; the first of equal ones."""
    # the quadratic in the factor needs two inner products alone
    square, mixed = float((own * own).sum()), float((own * wanted).sum())
    return min(range(len(options)), key=lambda index: options[index] ** 2 * square - 2 * options[index] * mixed)
