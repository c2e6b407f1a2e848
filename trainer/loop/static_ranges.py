"""Ranges for static scales of inputs, keys and values during training: a moving average over steps, the same on every rank."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...qat.layers.rounders import Rounders
from ..processes.world import max_over_ranks

RANGE_SHARE = 0.1
"""Share of the newest step in the moving average of ranges."""


class FollowedRanges:
    """Updates the ranges of static rounders after each step.

    The range of a step is that of all ranks and micro-batches together, so it does not depend on their number. Rounding starts with the
    second step. Dynamic rounders need no ranges and are only switched on and off.

    Args:
        rounders: Rounders of the student.
        key: Name of the ranges in checkpoints.
    """

    def __init__(self, rounders: Rounders, key: str) -> None:
        self._rounders, self._key = rounders, key
        self._ranges: Tensor | None = None
        # the same on every rank, so all or none take part in the collective of ``follow``
        self._follows = rounders.spec.scaling == "static"

    def start(self) -> None:
        """Starts observing."""
        if self._follows:
            self._rounders.observe()

    def enable(self, on: bool) -> None:
        """Switches rounding on or off."""
        self._rounders.enable(on)

    def follow(self) -> None:
        """Adds the range of the step to the average."""
        if self._follows:
            # [rounders, 2] = (-smallest, largest): one maximum over ranks covers both ends
            seen = max_over_ranks(self._rounders.extremes()).cpu()
            # forgets the step's range, so that the next one is seen by itself
            self._rounders.observe()
            # a moving average, because the range of a single step depends on its few windows
            self._set(seen if self._ranges is None else torch.lerp(self._ranges, seen, RANGE_SHARE))

    def forget_seen(self) -> None:
        """Drops the ranges seen since the last step."""
        if self._follows:
            self._rounders.observe()

    def state(self) -> dict[str, Tensor]:
        """The ranges; empty before the first step."""
        return {} if self._ranges is None else {self._key: self._ranges}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of ``state``."""
        if self._key in state:
            self._set(state[self._key])

    def _set(self, ranges: Tensor) -> None:
        self._ranges = ranges
        self._rounders.set_ranges(ranges)
