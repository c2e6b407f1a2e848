"""The training loop of one stage, from its first optimizer step to its last, on Lightning's Trainer."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .hooks import StepHook as StepHook
    from .objective import Objective as Objective

__getattr__, __dir__ = lazy_names(__name__)
