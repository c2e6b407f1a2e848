"""Ranges behind static scales, of inputs or of keys and values: a moving average over steps, the same on every rank."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...qat.layers.rounders import Rounders
from ..processes.world import max_over_ranks

RANGE_SHARE = 0.1
"""Share of the newest step in the moving average of ranges."""


class FollowedRanges:
    """Leads rounders through a stage. Static ones follow the range that all ranks have seen in a step, so that it depends on neither
    micro-batches nor ranks; they round from the second step on.

    Args:
        rounders: Of the student.
        key: Of the ranges in checkpoints.
    """

    def __init__(self, rounders: Rounders, key: str) -> None:
        self._rounders, self._key = rounders, key
        self._ranges: Tensor | None = None
        self._follows = rounders.spec.scaling == "static"

    def start(self) -> None:
        """Begin to watch."""
        if self._follows:
            self._rounders.observe()

    def enable(self, on: bool) -> None:
        """Round, or let everything pass."""
        self._rounders.enable(on)

    def follow(self) -> None:
        """Take the step's range into the average."""
        if self._follows:
            seen = max_over_ranks(self._rounders.extremes()).cpu()
            self._rounders.observe()
            self._set(seen if self._ranges is None else torch.lerp(self._ranges, seen, RANGE_SHARE))

    def forget_seen(self) -> None:
        """Drop what has been seen since the last step."""
        if self._follows:
            self._rounders.observe()

    def state(self) -> dict[str, Tensor]:
        """The ranges, once there are any."""
        return {} if self._ranges is None else {self._key: self._ranges}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of ``state``."""
        if self._key in state:
            self._set(state[self._key])

    def _set(self, ranges: Tensor) -> None:
        self._ranges = ranges
        self._rounders.set_ranges(ranges)
