"""Rounds a tensor of the forward pass and measures its range: the common part of ``input_hooks.py`` and ``kv_cache_hooks.py``."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...models.calibration.token_rows import token_rows
from ...models.common.errors import UserError
from ..fake_quant import fake_quant_activation, static_scale
from ..spec import ActivationSpec


class Padding:
    """Pre-hook of the backbone that remembers which tokens of the current batch are text."""

    def __init__(self) -> None:
        self.text: Tensor | None = None
        """bool [B, S], False for padding; None if there is no mask."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        # a mask of another shape says which tokens see which, not which tokens are padding
        self.text = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def without(self, x: Tensor) -> Tensor:
        """The rows of ``x`` [B, S, ...] (or flattened to [B x S, ...]) that are text; all of ``x`` if it has neither shape."""
        rows = None if self.text is None else token_rows(x, self.text, tuple(self.text.shape))
        return x if rows is None else rows


def watch_padding(model: nn.Module) -> Padding:
    """Hooks a ``Padding`` into transformers' backbone, so that ranges leave out what ``attention_mask`` marks as padding."""
    padding = Padding()
    # the backbone, because calibration runs it without the head
    getattr(model, "base_model", model).register_forward_pre_hook(padding, with_kwargs=True)
    return padding


class Rounder:
    """Rounds one tensor of the forward pass and measures its range."""

    def __init__(self, spec: ActivationSpec, padding: Padding) -> None:
        self.spec = spec
        self._padding = padding
        self.enabled = True
        self.observing = False
        self.scale: Tensor | None = None
        """fp32 [], only for static scaling; None = not known yet, and nothing is rounded."""
        self.zero: Tensor | None = None
        """int8 [], only for static asymmetric scaling."""
        self.extremes: Tensor | None = None
        """fp32 [2] = (-smallest, largest) value seen while observing."""
        self.outlier_columns: Tensor | None = None
        """bool [features]: where a value was an outlier while observing; None = not observed, or the spec keeps no outliers."""

    def note(self, x: Tensor) -> None:
        """While observing, extends the range by ``x`` [B, S, ...] without padding."""
        if self.observing:
            text = self._padding.without(x.detach())
            # a batch of padding alone has no range
            if not text.numel():
                return
            low, high = text.aminmax()
            # -low, so that one maximum (and one all-reduce over ranks) updates both ends
            seen = torch.stack([-low, high]).to(torch.float32)
            self.extremes = seen if self.extremes is None else torch.maximum(self.extremes, seen)
            if self.spec.outliers is not None:
                large = (text.abs() >= self.spec.outliers).reshape(-1, text.shape[-1]).any(0)
                self.outlier_columns = large if self.outlier_columns is None else self.outlier_columns | large

    def round(self, x: Tensor) -> Tensor:
        """``x`` as codes times scales; ``x`` itself while switched off or while a static scale is not known."""
        # without a scale the tensor passes, so that ranges are those of unrounded values
        if not self.enabled or (self.spec.scaling == "static" and self.scale is None):
            return x
        if self.spec.scaling == "dynamic":
            return fake_quant_activation(x, self.spec)
        assert self.scale is not None
        zero = None if self.zero is None else self.zero.to(x.device)
        return fake_quant_activation(x, self.spec, scale=self.scale.to(x.device), zero=zero)


class Rounders:
    """The rounders of a model, by name, in module order."""

    unseen = "{name} did not run on the text, so the range of its inputs is not known; add it to skip"
    """Message about a rounder that has seen nothing."""

    def __init__(self, spec: ActivationSpec, rounders: Mapping[str, Rounder]) -> None:
        self.spec = spec
        self.rounders = dict(rounders)

    def enable(self, on: bool) -> None:
        """Switches rounding on or off."""
        for rounder in self.rounders.values():
            rounder.enabled = on

    def observe(self, on: bool = True) -> None:
        """Starts or stops observing ranges; forgets the ranges so far."""
        for rounder in self.rounders.values():
            rounder.observing, rounder.extremes = on, None

    def extremes(self) -> Tensor:
        """fp32 [rounders, 2] = (-smallest, largest) seen since ``observe``; UserError names a rounder that has seen nothing."""
        for name, rounder in self.rounders.items():
            # an unseen range has no scale, and a guess would clip or waste codes
            if rounder.extremes is None:
                raise UserError(self.unseen.format(name=name))
        return torch.stack([rounder.extremes for rounder in self.rounders.values() if rounder.extremes is not None])

    def set_ranges(self, extremes: Tensor) -> None:
        """Sets static scales (and zero points) from ranges in the form of ``extremes``."""
        for rounder, (low, high) in zip(self.rounders.values(), extremes.cpu(), strict=True):
            # ``low`` is the negated minimum, as ``note`` stores it
            rounder.scale, rounder.zero = static_scale(-low, high, self.spec)

    def set_scales(self, scales: Mapping[str, Tensor], zeros: Mapping[str, Tensor]) -> None:
        """Sets static scales and zero points, by name."""
        for name, rounder in self.rounders.items():
            rounder.scale, rounder.zero = scales.get(name), zeros.get(name)

    def scales(self) -> dict[str, Tensor]:
        """Static scales by name, fp32 []; empty for dynamic scaling."""
        return {name: rounder.scale for name, rounder in self.rounders.items() if rounder.scale is not None}

    def zeros(self) -> dict[str, Tensor]:
        """Static zero points by name, int8 []; empty where there are none."""
        return {name: rounder.zero for name, rounder in self.rounders.items() if rounder.zero is not None}
