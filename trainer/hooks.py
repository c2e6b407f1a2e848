"""What may be done around each optimizer step, and the two hooks that keep pruned weights at zero (law 4).

A hook is told about the student and its optimizer once, then before each step (gradients summed and scaled, not yet clipped)
and after it. Its state goes into every checkpoint; everything else it knows must follow from the step number.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..models.errors import UserError
from ..models.families import decoder_linears
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
    """Keeps the zeros that given linear modules have at the start: a sparse folder's zeros are its mask.

    Args:
        modules: Names of linear modules, as in ``decoder_linears``; None = all of them.
    """

    name = "keep_zeros"

    def __init__(self, modules: Sequence[str] | None = None) -> None:
        self._modules = modules
        self._linears: dict[str, nn.Linear] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self.masks: dict[str, Tensor] = {}

    def on_start(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Read the masks from the weights."""
        self._attach(student, optimizer)
        self._set_masks(zero_masks(self.weights()))

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
        self._set_masks({name: mask.to(self._linears[name].weight.device, torch.bool) for name, mask in state.items()})

    def weights(self) -> dict[str, Tensor]:
        """The watched weights by module name, detached, sharing memory."""
        return {name: linear.weight.detach() for name, linear in self._linears.items()}

    def _attach(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        linears = decoder_linears(student)
        names = list(linears) if self._modules is None else list(self._modules)
        if unknown := [name for name in names if name not in linears]:
            raise UserError(f"{unknown[0]} is to stay sparse, but the model has no such linear layer; it has e.g. {next(iter(linears), 'none')}")
        self._linears = {name: linears[name] for name in names}
        self._optimizer = optimizer

    def _set_masks(self, masks: dict[str, Tensor]) -> None:
        self.masks = masks
        for name, mask in masks.items():
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

    Args:
        settings: Share kept, scope, update interval and healing time.
        total_steps: Optimizer steps of the stage.
        modules: Names of linear modules; None = all decoder linears.
        tell: Called with (step, share kept) after each mask update.
    """

    name = "magnitude"

    def __init__(
        self,
        settings: MagnitudeSettings,
        total_steps: int,
        modules: Sequence[str] | None = None,
        tell: Callable[[int, float], None] | None = None,
    ) -> None:
        super().__init__(modules)
        self._settings = settings
        self._total = total_steps
        self._tell = tell
        self._keep = 1.0

    def on_start(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Start from what is there: weights that are zero already stay zero."""
        super().on_start(student, optimizer)
        self._keep = 1.0

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

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the saved masks, and with them the place in the schedule."""
        self._keep = float(state["keep"])
        super().load({name: mask for name, mask in state.items() if name != "keep"})

    def state(self) -> dict[str, Tensor]:
        """The masks and the share they keep."""
        return {**self.masks, "keep": torch.tensor(self._keep, dtype=torch.float64)}
