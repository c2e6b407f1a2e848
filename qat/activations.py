"""Rounding what quantized linears read: a forward pre-hook, the same in training, in calibration and when a stored model is measured.

inputs = round_inputs(model, modules, ActivationSpec())                     dynamic: a scale for each token
inputs = round_inputs(model, modules, ActivationSpec(scaling="static"))     until it has a range it lets everything pass
inputs.observe(); ...; inputs.set_ranges(inputs.extremes())                 scales of the range that was seen since
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..models.errors import UserError
from .fake_quant import fake_quant_activation, static_scale
from .spec import ActivationSpec


class _Padding:
    """Pre-hook of the backbone: remembers which tokens of the batch on its way are text."""

    def __init__(self) -> None:
        self.text: Tensor | None = None
        """bool [B, S], False for padding; None where there is none."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self.text = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def without(self, x: Tensor) -> Tensor:
        """``x`` [B, S, features] as rows of text alone."""
        return x[self.text] if self.text is not None and x.shape[:2] == self.text.shape else x


class InputRounder:
    """The hook of one module."""

    def __init__(self, spec: ActivationSpec, padding: _Padding) -> None:
        self.spec = spec
        self._padding = padding
        self.enabled = True
        self.observing = False
        self.scale: Tensor | None = None
        """fp32 [], static scaling only; None = not known yet, and nothing is rounded."""
        self.zero: Tensor | None = None
        """int8 [], static and asymmetric scaling only."""
        self.extremes: Tensor | None = None
        """fp32 [2] = (-smallest, largest) input seen while observing."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        if self.observing:
            low, high = self._padding.without(x.detach()).aminmax()
            seen = torch.stack([-low, high]).to(torch.float32)
            self.extremes = seen if self.extremes is None else torch.maximum(self.extremes, seen)
        if not self.enabled or (self.spec.scaling == "static" and self.scale is None):
            return args
        if self.spec.scaling == "dynamic":
            return (fake_quant_activation(x, self.spec), *args[1:])
        assert self.scale is not None
        zero = None if self.zero is None else self.zero.to(x.device)
        return (fake_quant_activation(x, self.spec, scale=self.scale.to(x.device), zero=zero), *args[1:])


class RoundedInputs:
    """The hooks of a model, by module name, in module order."""

    def __init__(self, spec: ActivationSpec, rounders: dict[str, InputRounder]) -> None:
        self.spec = spec
        self.rounders = rounders

    def enable(self, on: bool) -> None:
        """Round, or let everything pass."""
        for rounder in self.rounders.values():
            rounder.enabled = on

    def observe(self, on: bool = True) -> None:
        """Start (or stop) noting what is read; forgets what was noted."""
        for rounder in self.rounders.values():
            rounder.observing, rounder.extremes = on, None

    def extremes(self) -> Tensor:
        """fp32 [modules, 2] = (-smallest, largest) seen since ``observe``; UserError naming a module that read nothing."""
        for name, rounder in self.rounders.items():
            if rounder.extremes is None:
                raise UserError(f"{name} took no part in running the text, so the range of its inputs is not known; add it to skip")
        return torch.stack([rounder.extremes for rounder in self.rounders.values() if rounder.extremes is not None])

    def set_ranges(self, extremes: Tensor) -> None:
        """Static scales (and zero points) of ranges in the form of ``extremes``."""
        for rounder, (low, high) in zip(self.rounders.values(), extremes.cpu(), strict=True):
            rounder.scale, rounder.zero = static_scale(-low, high, self.spec)

    def scales(self) -> dict[str, Tensor]:
        """Static scales by module, fp32 []; empty for dynamic scaling."""
        return {name: rounder.scale for name, rounder in self.rounders.items() if rounder.scale is not None}

    def zeros(self) -> dict[str, Tensor]:
        """Static zero points by module, int8 []; empty where there are none."""
        return {name: rounder.zero for name, rounder in self.rounders.items() if rounder.zero is not None}


def round_inputs(model: nn.Module, modules: Iterable[str], spec: ActivationSpec) -> RoundedInputs:
    """Let ``modules`` (full names) read rounded inputs from now on; static scaling begins once it has ranges.

    Ranges leave out what ``attention_mask`` of transformers' backbone calls padding.
    """
    padding = _Padding()
    getattr(model, "base_model", model).register_forward_pre_hook(padding, with_kwargs=True)
    rounders = {name: InputRounder(spec, padding) for name in modules}
    for name, rounder in rounders.items():
        model.get_submodule(name).register_forward_pre_hook(rounder)
    return RoundedInputs(spec, rounders)


def round_inputs_as_stored(
    model: nn.Module, modules: Iterable[str], spec: ActivationSpec, scales: Mapping[str, Tensor], zeros: Mapping[str, Tensor]
) -> RoundedInputs:
    """``round_inputs`` with the scales that a quantized folder holds."""
    inputs = round_inputs(model, modules, spec)
    for name, rounder in inputs.rounders.items():
        rounder.scale, rounder.zero = scales.get(name), zeros.get(name)
    return inputs
