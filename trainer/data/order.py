"""The order of training windows: an endless stream of one permutation per epoch, a pure function of seed and position.

Optimizer step t takes positions t*G .. (t+1)*G - 1 of the stream (G = windows per step), for any number of ranks and micro-batches. So
resuming needs no saved state, and another world size or micro-batch neither loses nor repeats a window.

Windows of a blend (``blend.py``) have a stream of permutations for each text: a text that runs out begins its next epoch by itself.
"""

from collections.abc import Iterator, Sized

import numpy as np
from torch.utils.data import Sampler

from .blend import Blend

_ONCE = 1024
"""Positions that are looked at together for windows that come for the first time."""
_DOMAIN = 0x6F72646572  # "order": makes these streams differ from other uses of the same seed


def sample_order(num: int, seed: int, epoch: int, text: int | None = None) -> np.ndarray:
    """A permutation of ``range(num)``, int64 [num], that depends only on the numbers; ``text`` is the place of a text in a blend.

    It is made from raw PCG64 words, whose stream numpy guarantees (NEP 19); that of ``Generator.permutation`` may change.
    """
    entropy = [_DOMAIN, seed % 2**64, epoch, *([] if text is None else [text])]
    # two 64-bit words are practically never equal; a stable sort would order even them in the same way everywhere
    words = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(num)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def blend_of(windows: object) -> Blend | None:
    """The blend that windows belong to; None for those of one text."""
    blend = getattr(windows, "blend", None)
    return blend if isinstance(blend, Blend) else None


class WindowOrder:
    """The endless stream of windows.

    Args:
        windows: The windows; only their number, and the blend that they belong to, are used.
        seed: Seed of the order.
    """

    def __init__(self, windows: Sized, seed: int) -> None:
        self.blend = blend_of(windows)
        self._seed = seed
        # one text without a blend is drawn as before there were blends
        self._sizes = self.blend.sizes if self.blend else (len(windows),)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def at(self, first: int, count: int) -> list[int]:
        """Windows at positions ``first .. first + count - 1``."""
        if self.blend is None:
            return self._of(0, np.arange(first, first + count, dtype=np.int64)).tolist()
        texts, numbers = self.blend.places(first, count)
        taken = np.empty(count, dtype=np.int64)
        for text in np.unique(texts).tolist():
            own = texts == text
            taken[own] = self.blend.begins[text] + self._of(text, numbers[own])
        return taken.tolist()

    def once(self) -> Iterator[int]:
        """Windows in the order of the stream, each once: a text that runs out leaves the others to go on."""
        left, first = sum(self._sizes), 0
        while left:
            count = _ONCE if self.blend else left
            fresh = [True] * count
            if self.blend is not None:
                texts, numbers = self.blend.places(first, count)
                fresh = (numbers < np.array(self._sizes)[texts]).tolist()
            for index, new in zip(self.at(first, count), fresh):
                if new:
                    left -= 1
                    yield index
            first += count

    def seen(self, count: int) -> list[int]:
        """Windows among the first ``count`` positions, ascending, each once."""
        if self.blend is None:
            return sorted(self.at(0, min(count, self._sizes[0])))
        found: list[int] = []
        for text, taken in enumerate(self.blend.taken(count)):
            own = self._of(text, np.arange(min(taken, self._sizes[text]), dtype=np.int64))
            found += (self.blend.begins[text] + np.sort(own)).tolist()
        return found

    def repeats(self, count: int) -> bool:
        """Whether a window comes twice among the first ``count`` positions."""
        taken = self.blend.taken(count) if self.blend else [count]
        return any(number > size for number, size in zip(taken, self._sizes))

    def _of(self, text: int, numbers: np.ndarray) -> np.ndarray:
        """Windows of one text, counted in it, at places of its own stream; both int64 and ``numbers`` ascending."""
        size = self._sizes[text]
        epochs, offsets = np.divmod(numbers, size)
        found = np.empty(len(numbers), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            # one permutation of each text in memory at a time; a step may begin in one epoch and end in the next
            if self._orders.get(text, (-1, None))[0] != epoch:
                self._orders[text] = epoch, sample_order(size, self._seed, epoch, text if self.blend else None)
            found[epochs == epoch] = self._orders[text][1][offsets[epochs == epoch]]
        return found


class StepBatches(Sampler[list[int]]):
    """Batch sampler of one rank: yields the window indices of each micro-batch, step after step.

    Iterating always starts at ``start_step``. ``len()`` is the number of micro-batches that are left.

    Args:
        windows: The windows; only their number, and the blend that they belong to, are used.
        global_batch: Windows per optimizer step over all ranks.
        micro_batch: Windows per micro-batch; divides ``global_batch / world``.
        rank, world: Number of this process, and number of processes.
        seed: Seed of the order.
        start_step: First optimizer step to yield.
        total_steps: Optimizer steps of the stage; steps ``start_step .. total_steps - 1`` are yielded.

    Raises:
        ValueError: there are no windows, or the sizes do not divide.
    """

    def __init__(
        self, windows: Sized, *, global_batch: int, micro_batch: int, rank: int, world: int, seed: int, start_step: int, total_steps: int
    ) -> None:
        if len(windows) == 0:
            raise ValueError("there are no windows to train on")
        if global_batch < 1 or micro_batch < 1 or global_batch % (world * micro_batch):
            raise ValueError(
                f"global_batch={global_batch} is not a multiple of world={world} x micro_batch={micro_batch}; see derive_batch"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank} must lie in [0, {world})")
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world = rank, world
        self.start_step, self.total_steps = start_step, total_steps
        self._order = WindowOrder(windows, seed)

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step) * (self.global_batch // self.world // self.micro_batch)

    def __iter__(self) -> Iterator[list[int]]:
        share = self.global_batch // self.world
        for step in range(self.start_step, self.total_steps):
            # ranks take neighbouring shares of the step, each in the stream's order, so all ranks together take the same windows for any
            # world size
            first = step * self.global_batch + self.rank * share
            mine = self._order.at(first, share)
            for begin in range(0, share, self.micro_batch):
                yield mine[begin : begin + self.micro_batch]

    def positions(self, first: int, count: int) -> list[int]:
        """Windows at positions ``first .. first + count - 1`` of the endless stream."""
        return self._order.at(first, count)
