"""Quantizes the inputs of linears by a forward pre-hook, the same in training, in calibration and when a stored model is measured.

inputs = round_inputs(model, modules, ActivationSpec())                     dynamic: one scale per token
inputs = round_inputs(model, modules, ActivationSpec(scaling="static"))     inputs pass unchanged until it has a range
inputs.observe(); ...; inputs.set_ranges(inputs.extremes())                 scales from the range seen since ``observe``
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from ...models.calibration.token_rows import linear_input, with_input
from ...models.common.errors import UserError
from ..spec import ActivationSpec
from .rounders import Padding, Rounder, Rounders, watch_padding


class InputRounder(Rounder):
    """The hook of one linear; it rounds the linear's input."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # before rounding: a range is that of the unrounded inputs
        self.note(linear_input(args, kwargs))
        return with_input(args, kwargs, self.round)


class RoundedInputs(Rounders):
    """The input hooks of a model, by module name, in module order."""


def round_inputs(model: nn.Module, modules: Collection[str], spec: ActivationSpec, padding: Padding | None = None) -> RoundedInputs:
    """Makes ``modules`` (full names) read rounded inputs from now on; static scaling begins once it has ranges.

    Ranges leave out the padding that ``attention_mask`` of transformers' backbone marks. ``padding`` may be a hook that already watches it.
    UserError names a module whose inputs the groups of the kind (mxfp4, nvfp4) do not divide.
    """
    for name in modules:
        _check_width(name, model.get_submodule(name), spec)
    # one hook watches for all: a second one would look at every mask again
    padding = padding or watch_padding(model)
    rounders = {name: InputRounder(spec, padding) for name in modules}
    for name, rounder in rounders.items():
        # a pre-hook, so that every class of linear reads rounded inputs, also one that was replaced before
        model.get_submodule(name).register_forward_pre_hook(rounder, with_kwargs=True)
    return RoundedInputs(spec, rounders)


def _check_width(name: str, module: nn.Module, spec: ActivationSpec) -> None:
    group, inputs = spec.matrix_spec.group_size, getattr(module, "in_features", 0)
    if isinstance(group, int) and inputs % group:
        raise UserError(
            f"activations: {name} has {inputs} inputs, which groups of {group} ({spec.kind}) do not divide; use kind: fp8_e4m3, or skip it"
        )


def round_inputs_as_stored(
    model: nn.Module, modules: Collection[str], spec: ActivationSpec, scales: Mapping[str, Tensor], zeros: Mapping[str, Tensor]
) -> RoundedInputs:
    """``round_inputs`` with the scales of a quantized folder."""
    inputs = round_inputs(model, modules, spec)
    inputs.set_scales(scales, zeros)
    return inputs
