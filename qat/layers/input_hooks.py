"""Rounding what quantized linears read: a forward pre-hook, the same in training, in calibration and when a stored model is measured.

inputs = round_inputs(model, modules, ActivationSpec())                     dynamic: a scale for each token
inputs = round_inputs(model, modules, ActivationSpec(scaling="static"))     until it has a range it lets everything pass
inputs.observe(); ...; inputs.set_ranges(inputs.extremes())                 scales of the range that was seen since
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..spec import ActivationSpec
from .rounders import Padding, Rounder, Rounders, watch_padding


class InputRounder(Rounder):
    """The hook of one module: its first argument is rounded."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        self.note(x)
        return (self.round(x), *args[1:])


class RoundedInputs(Rounders):
    """The hooks of a model, by module name, in module order."""


def round_inputs(model: nn.Module, modules: Iterable[str], spec: ActivationSpec, padding: Padding | None = None) -> RoundedInputs:
    """Let ``modules`` (full names) read rounded inputs from now on; static scaling begins once it has ranges.

    Ranges leave out what ``attention_mask`` of transformers' backbone calls padding (``padding``: one that watches it already).
    """
    padding = padding or watch_padding(model)
    rounders = {name: InputRounder(spec, padding) for name in modules}
    for name, rounder in rounders.items():
        model.get_submodule(name).register_forward_pre_hook(rounder)
    return RoundedInputs(spec, rounders)


def round_inputs_as_stored(
    model: nn.Module, modules: Iterable[str], spec: ActivationSpec, scales: Mapping[str, Tensor], zeros: Mapping[str, Tensor]
) -> RoundedInputs:
    """``round_inputs`` with the scales that a quantized folder holds."""
    inputs = round_inputs(model, modules, spec)
    inputs.set_scales(scales, zeros)
    return inputs
