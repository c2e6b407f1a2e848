"""Hooks around each optimizer step, and the two that keep pruned weights at zero (law 4, docs/architecture.md).

A hook is called once with the student and its optimizer, then before each step (gradients are summed and scaled, not yet clipped) and
after it. Its state is saved in every checkpoint; everything else that it uses must follow from the step number.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ...models.common.errors import UserError
from ...models.pruning.magnitude import cubic_keep, stream_masks
from ...models.pruning.pattern import Pattern
from ...models.pruning.selection import magnitude_pattern_mask
from ..checkpoints.optimizer_moments import zero_moments
from ..processes.sharding import Rows, gathered, like, local, own_rows, parameter_of, whole
from ..settings_sparsity import MagnitudeSettings


class StepHook(Protocol):
    """Acts around every optimizer step. ``name`` is the key of its tensors in checkpoints."""

    name: str

    def on_start(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called once per process start, on the training device, before ``load`` and the first step."""
        ...

    def before_step(self, step: int) -> None:
        """Called when the gradients of step ``step`` (the first is 1) are complete and not yet clipped."""
        ...

    def after_step(self, step: int) -> None:
        """Called when the optimizer has taken step ``step``."""
        ...

    def state(self) -> Mapping[str, Tensor | Rows]:
        """Tensors that a resumed run needs; for tensors that are sharded as a weight is, this rank's rows."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of ``state``, rows as plain tensors; called after ``on_start`` when a run is resumed."""
        ...


@runtime_checkable
class Shaping(Protocol):
    """A hook that leads the student to another form along a schedule: fewer weights, fewer bits."""

    def reached(self, step: int) -> bool:
        """Whether the student after ``step`` has the form that the stage promises; a function of the step alone."""
        ...


class KeepZeros:
    """Keeps pruned weights of linear modules at zero; the exact zeros of a sparse model are its mask.

    Masks are sharded as the weights are: whole, or under FSDP2 the rows that this rank holds. ``on_start`` fills ``masks`` (by module name,
    bool, True = kept).

    Args:
        modules: Names of linear modules, as in ``decoder_linears``, whose exact zeros stay zero.
    """

    name = "keep_zeros"

    def __init__(self, modules: Iterable[str]) -> None:
        self._modules = list(modules)
        self._linears: dict[str, nn.Linear] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._trained: dict[str, Tensor | None] = {}
        self.masks: dict[str, Tensor] = {}

    def on_start(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Finds the modules; weights that are zero now stay zero."""
        self._optimizer = optimizer
        self._linears = {name: _linear(student, name) for name in self._modules}
        # None for a frozen weight, and for one of which this rank has no row: there are no moments to clear
        self._trained = {name: parameter_of(optimizer, linear.weight) for name, linear in self._linears.items()}
        self._set_masks({name: local(linear.weight) != 0 for name, linear in self._linears.items()})
        self._apply()

    def before_step(self, step: int) -> None:
        """Sets gradients of removed weights to zero, so that they do not count in the clipped norm."""
        for name, mask in self.masks.items():
            gradient = self._linears[name].weight.grad
            if gradient is not None:
                # local rows and local mask: no communication under FSDP2
                local(gradient).mul_(mask)

    def after_step(self, step: int) -> None:
        """Sets removed weights and their moments to zero: momentum and weight decay may have moved them."""
        self._apply()

    def state(self) -> dict[str, Tensor | Rows]:
        """The masks: True = kept."""
        return {name: like(mask, self._linears[name].weight) for name, mask in self.masks.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Sets the saved masks."""
        if different := sorted(state.keys() ^ self._linears.keys()):
            raise UserError(f"the checkpoint masks other modules than this stage: {different[0]} is in only one of them")
        # Not the zeros of the weights: a kept weight may pass through exact zero while it trains, and must stay free to move on.
        self._set_masks(state)
        self._apply()

    def _set_masks(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            weight = self._linears[name].weight
            self.masks[name] = mask.to(weight.device, torch.bool)
            # A quantized linear masks in its forward pass too. A sharded one sees the whole weight, but this rank has only a part of the
            # mask. It needs none, because removed weights are exact zeros, which change no scale and round to zero.
            if hasattr(self._linears[name], "mask") and local(weight).shape == weight.shape:
                self._linears[name].mask = self.masks[name]

    def _apply(self) -> None:
        assert self._optimizer is not None, "on_start comes first"
        with torch.no_grad():
            for name, mask in self.masks.items():
                local(self._linears[name].weight).mul_(mask)
                parameter = self._trained[name]
                if parameter is not None:
                    zero_moments(self._optimizer, parameter, mask)


class MaskHook(KeepZeros):
    """Magnitude pruning on the cubic schedule of Zhu & Gupta 2017; masks only shrink.

    With a pattern N:M the weights kept of each M fall one by one from M to N, as soon as the share of the schedule allows it.

    The masks are the whole state: the share follows from the step, and choosing the same share again among kept weights changes nothing.

    Args:
        modules: Names of the linear modules to prune.
        settings: Share kept or pattern, scope, update interval and healing time.
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
        super().__init__(modules)
        self._settings = settings
        self._total = total_steps
        self._tell = tell
        self._keep = 1.0

    def on_start(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Starts from the current weights; weights that are already zero stay zero."""
        self._keep = 1.0
        super().on_start(student, optimizer)

    def after_step(self, step: int) -> None:
        """Shrinks the masks if the schedule requires it, then applies them."""
        # a function of the step alone, so all ranks shrink, or none, and ``_shrink`` may be collective
        keep = self.keep_at(step)
        # after a resume ``_keep`` is 1.0 again: the first call chooses the saved share again among kept weights, which changes nothing
        if keep < self._keep:
            self._keep = keep
            self._shrink(keep)
            if self._tell is not None:
                self._tell(step, keep)
        self._apply()

    def reached(self, step: int) -> bool:
        """Whether the masks after ``step`` are as small as they get."""
        return self.keep_at(step) <= self._settings.share

    def _shrink(self, keep: float) -> None:
        """Chooses new masks, so that the choice does not depend on the sharding: in groups of a row, or on whole matrices, gathering one
        at a time."""
        if (final := self._settings.nm) is not None:
            pattern = pattern_at(final, keep)
            # a rank holds whole rows, and so whole groups: no communication
            rows = {name: local(linear.weight) for name, linear in self._linears.items()}
            self._set_masks({name: magnitude_pattern_mask(name, own, pattern, self.masks[name]) for name, own in rows.items()})
            return
        # collective: all ranks go through the modules in the same order, and each computes the same masks
        masks = stream_masks(self._whole, self._modules, keep, self._settings.scope)
        self._set_masks({name: own_rows(mask, self._linears[name].weight) for name, mask in masks})

    def _whole(self, name: str) -> tuple[Tensor, Tensor]:
        weight = self._linears[name].weight
        # as uint8, because not every communication back end gathers booleans
        return whole(weight), gathered(self.masks[name].to(torch.uint8), weight).bool()

    def keep_at(self, step: int) -> float:
        """Share of weights kept after step ``step``; at the last step it is always the target."""
        settings, share = self._settings, self._settings.share
        return share if step >= self._total else cubic_keep(step, self._total, share, settings.heal, settings.update_every)


def pattern_at(final: Pattern, keep: float) -> Pattern:
    """The pattern on the way to ``final`` when the schedule keeps the share ``keep``: as many of each group as that, rounded up."""
    # 1e-9, so that a product that is a whole number but for rounding does not count as one more
    return Pattern(max(final.kept, math.ceil(keep * final.group - 1e-9)), final.group)


def _linear(student: nn.Module, name: str) -> nn.Linear:
    try:
        module = student.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise UserError(f"{name} has a mask, but the model has no linear layer of that name; use the model that was pruned")
    return module
