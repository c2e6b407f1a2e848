"""Eval mode for the time of a block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def eval_mode(model: "nn.Module") -> Iterator[None]:
    """Put a model into eval mode inside the block; afterwards each module has its former mode."""
    # per module: a user may keep parts in eval mode while the rest trains, which model.train() would undo
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
