"""Callbacks that the recipe imports: Lightning callbacks, and hooks around optimizer steps (``parts.callback``)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...parts import Part, PartError
from ..settings_own import CallbackSettings, OwnCallbackSettings
from .callback_state import CallbackState
from .hooks import StepHook

_PRESENT = "present"
"""A tensor of every hook with state, so that a checkpoint knows the hook before it has tensors of its own."""
_METHODS = ("on_start", "before_step", "after_step", "state", "load")


@dataclass(frozen=True)
class OwnCallbacks:
    """The callbacks of one training stage on this rank."""

    hooks: Sequence[StepHook] = ()
    """In the recipe's order."""
    lightning: Sequence[pl.Callback] = field(default_factory=tuple)
    """Called between decoct's own Lightning callbacks: after the hooks of a step, and before its checkpoint."""


class OwnHook:
    """A hook of the user's, of which any method may be absent."""

    def __init__(self, part: Part, target: Any) -> None:
        self.name = f"own-{part.name}"
        self._part = part
        self._target = target

    def on_start(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Hands on."""
        self._call("on_start", student, optimizer)

    def before_step(self, step: int) -> None:
        """Hands on."""
        self._call("before_step", step)

    def after_step(self, step: int) -> None:
        """Hands on."""
        self._call("after_step", step)

    def state(self) -> dict[str, Tensor]:
        """The user's tensors.

        Raises:
            PartError: the user's ``state`` returns anything but whole tensors by name.
        """
        if not hasattr(self._target, "state"):
            return {}
        found = self._target.state()
        whole = isinstance(found, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())
        if not whole or _PRESENT in found:
            raise PartError(
                f"{self._part.place}: state() of callback '{self._part.name}' must return tensors by name, none named {_PRESENT!r}"
            )
        if any(isinstance(tensor, DTensor) for tensor in found.values()):
            raise PartError(
                f"{self._part.place}: state() of callback '{self._part.name}' returns tensors that fsdp2 has spread over the ranks, which "
                "checkpoints cannot hold for a callback; set trainer.strategy: ddp, or keep plain tensors, the same on every rank"
            )
        return {_PRESENT: torch.ones(()), **cast("Mapping[str, Tensor]", found)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Hands on what ``state`` returned."""
        self._call("load", {name: tensor for name, tensor in state.items() if name != _PRESENT})

    def _call(self, method: str, *given: Any) -> None:
        if (own := getattr(self._target, method, None)) is not None:
            own(*given)


def own_callbacks(settings: Sequence[CallbackSettings]) -> OwnCallbacks:
    """Make the callbacks that a stage names.

    Raises:
        PartError: an object is neither a Lightning callback nor has a method of a hook.
    """
    hooks: list[StepHook] = []
    lightning: list[pl.Callback] = []
    for one in settings:
        assert isinstance(one, OwnCallbackSettings), "CallbackSettings refuses names that are not imported"
        made = one.part.call(options=one.own_options())
        if isinstance(made, pl.Callback):
            lightning.append(made)
            if CallbackState.has_state(made):
                hooks.append(CallbackState(one.part, made))
        elif any(callable(getattr(made, method, None)) for method in _METHODS):
            hooks.append(OwnHook(one.part, made))
        else:
            raise PartError(
                f"{one.part.place}: callback '{one.part.name}' made a {type(made).__name__}, which is neither a Lightning callback nor has "
                f"one of the methods {', '.join(_METHODS)}"
            )
    return OwnCallbacks(hooks, lightning)
