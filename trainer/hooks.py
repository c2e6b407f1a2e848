"""What may be done around each optimizer step, and the two hooks that keep pruned weights at zero (law 4).

A hook is told about the student and its optimizer once, then before each step (gradients summed and scaled, not yet clipped)
and after it. Its state goes into every checkpoint; everything else it knows must follow from the step number.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from ..models.errors import UserError
from ..models.pruning.magnitude import cubic_keep, magnitude_masks, zero_masks
from .settings import MagnitudeSettings


class StepHook(Protocol):
    """Something that acts around every optimizer step. ``name`` keys its tensors in checkpoints."""

    name: str

    def on_start(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called once per process start, on the training device, before ``load`` and the first step."""
        ...

    def before_step(self, step: int) -> None:
        """Gradients of step ``step`` (the first is 1) are complete and not yet clipped."""
        ...

    def after_step(self, step: int) -> None:
        """The optimizer has taken step ``step``."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of ``state``; called after ``on_start`` when a run is resumed."""
        ...


class KeepZeros:
    """Keeps pruned weights of linear modules at zero: a sparse folder's zeros are its mask.

    Args:
        masks: By module name, as in ``decoder_linears``: bool [out, in], True = kept. ``zero_masks`` makes them from weights.
    """

    name = "keep_zeros"

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._linears: dict[str, nn.Linear] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self.masks: dict[str, Tensor] = dict(masks)

    def on_start(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Find the modules, and zero what the masks remove."""
        self._optimizer = optimizer
        self._linears = {name: _linear(student, name) for name in self.masks}
        self._set_masks(self.masks)
        self._apply()

    def before_step(self, step: int) -> None:
        """Removed weights get no gradient, so they have no part in the clipped norm either."""
        for name, mask in self.masks.items():
            gradient = self._linears[name].weight.grad
            if gradient is not None:
                gradient.mul_(mask)

    def after_step(self, step: int) -> None:
        """Removed weights and their moments are zero, whatever the optimizer did."""
        self._apply()

    def state(self) -> dict[str, Tensor]:
        """The masks: True = kept."""
        return dict(self.masks)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the saved masks."""
        if different := sorted(state.keys() ^ self._linears.keys()):
            raise UserError(f"the checkpoint masks other modules than this stage: {different[0]} is in only one of them")
        self._set_masks(state)
        self._apply()

    def weights(self) -> dict[str, Tensor]:
        """The watched weights by module name, detached, sharing memory."""
        return {name: linear.weight.detach() for name, linear in self._linears.items()}

    def _set_masks(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = {name: mask.to(self._linears[name].weight.device, torch.bool) for name, mask in masks.items()}
        for name, mask in self.masks.items():
            # a quantized linear masks inside its forward pass too, so that scales see kept weights only
            if hasattr(self._linears[name], "mask"):
                self._linears[name].mask = mask

    def _apply(self) -> None:
        assert self._optimizer is not None, "on_start comes first"
        with torch.no_grad():
            for name, mask in self.masks.items():
                weight = self._linears[name].weight
                weight.mul_(mask)
                for moment in self._optimizer.state.get(weight, {}).values():
                    if isinstance(moment, Tensor) and moment.shape == weight.shape:
                        moment.mul_(mask)


class MaskHook(KeepZeros):
    """Magnitude pruning on the cubic schedule of Zhu & Gupta 2017; masks only ever shrink.

    The masks are all the state there is: the share follows from the step, and choosing it again among what is kept changes nothing.

    Args:
        modules: Names of the linear modules to prune.
        settings: Share kept, scope, update interval and healing time.
        total_steps: Optimizer steps of the stage.
        tell: Called with (step, share kept) after each mask update.
    """

    name = "magnitude"

    def __init__(
        self,
        modules: Iterable[str],
        settings: MagnitudeSettings,
        total_steps: int,
        tell: Callable[[int, float], None] | None = None,
    ) -> None:
        super().__init__({})
        self._modules = list(modules)
        self._settings = settings
        self._total = total_steps
        self._tell = tell
        self._keep = 1.0

    def on_start(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Start from what is there: weights that are zero already stay zero."""
        self._keep = 1.0
        self.masks = zero_masks({name: _linear(student, name).weight.detach() for name in self._modules})
        super().on_start(student, optimizer)

    def after_step(self, step: int) -> None:
        """Shrink the masks when the schedule says so, then apply them."""
        keep = self.keep_at(step)
        if keep < self._keep:
            self._keep = keep
            self._set_masks(magnitude_masks(self.weights(), keep, self._settings.scope, self.masks))
            if self._tell is not None:
                self._tell(step, keep)
        self._apply()

    def keep_at(self, step: int) -> float:
        """Share of weights kept after step ``step``; the last step always ends at the target."""
        settings = self._settings
        return settings.keep if step >= self._total else cubic_keep(step, self._total, settings.keep, settings.heal, settings.update_every)


def _linear(student: nn.Module, name: str) -> nn.Linear:
    try:
        module = student.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise UserError(f"{name} is to be masked, but the model has no linear layer of that name")
    return module
