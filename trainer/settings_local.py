"""Settings of local distillation, which lets each decoder layer of a pruned model learn its parent's output."""

from dataclasses import dataclass
from typing import Literal

from .. import Count, check_fields
from .settings import Rate


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """After a one-shot prune, train each decoder layer alone, first to last, to give its parent's output. A layer's result is kept only if
    it lowers the layer's error on held-out windows. A killed stage goes on at the layer where it was."""

    tokens: Count = 131_072
    """Tokens of training text that each layer learns on; a quarter more is held out."""
    learning_rate: Rate | None = None
    """Peak learning rate. Default: 1.5e-3 at 192 hidden channels of the pruned model, falling with 1 / hidden."""
    epochs: Count = 1
    """Passes over these tokens."""

    inputs: Literal["student", "parent"] = "student"
    """What a layer reads while it learns: student = the outputs of the pruned layers before it, whose errors it then makes up for; parent =
    what its parent's layer reads."""

    def __post_init__(self) -> None:
        check_fields(self)
