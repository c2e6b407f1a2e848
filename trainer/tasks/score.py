"""The score of a model on one task, as the report has it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A score, how far it may be off, and how it was taken."""

    task: str
    """Name of the task."""
    metric: str
    """What is scored, such as 'exact match'."""
    score: float
    """Share of the items, or the value of a metric of lm-eval."""
    stderr: float | None
    """Standard error of the score over items; None when it is not known."""
    items: int
    """Items scored."""
    shots: int
    """Solved examples before each item."""
    limit: int | None
    """Most items that were to be scored; None = all."""
    batch: int | None
    """Sequences per forward pass; None = as many as fit into 4,096 tokens."""
    seed: int
    """Seed of the choice of items and examples."""
    source: str
    """What defines the task: 'decoct', a file with the hash of its content, or the version of lm-eval and of the task."""
    higher_is_better: bool = True
    """Whether a larger score is better."""
    metrics: dict[str, float] | None = None
    """All metrics of a task that has several."""

    def row(self) -> dict[str, Any]:
        """As plain data, for the report."""
        return asdict(self)


def share_and_error(hits: Sequence[bool]) -> tuple[float, float | None]:
    """Mean of independent hits and its standard error; no error for a single one."""
    share = sum(hits) / len(hits)
    return share, math.sqrt(share * (1 - share) / (len(hits) - 1)) if len(hits) > 1 else None
