"""The processes that score one text together, as far as scores need to know."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """One process among several, each of which reads its own part of the text."""

    rank: int = 0
    size: int = 1
    sum: Callable[[Tensor], Tensor] = lambda values: values
    """Adds a tensor up over all processes, in place, and returns it."""

    def share(self, batches: Sequence[Any]) -> Sequence[Any]:
        """The batches of this process."""
        return batches[self.rank :: self.size]

    def number(self, value: float) -> float:
        """The sum of one number over all processes."""
        return float(self.sum(torch.tensor([value], dtype=torch.float64)))

    def first_says(self, value: bool) -> bool:
        """What the first process says, on every process."""
        return self.number(float(value and self.rank == 0)) > 0


ALONE = Ranks()
"""A single process."""
