"""The order of training windows: an endless stream of one permutation per epoch, a pure function of seed and position.

Optimizer step t takes positions t*G .. (t+1)*G - 1 of the stream (G = windows per step), for any number of ranks and micro-batches. So
resuming needs no saved state, and another world size or micro-batch neither loses nor repeats a window.
"""

from collections.abc import Iterator, Sized

import numpy as np
from torch.utils.data import Sampler

_DOMAIN = 0x6F72646572  # "order": makes these streams differ from other uses of the same seed


def sample_order(num: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of ``range(num)``, int64 [num], that depends only on the three numbers.

    It is made from raw PCG64 words, whose stream numpy guarantees (NEP 19); that of ``Generator.permutation`` may change.
    """
    # two 64-bit words are practically never equal; a stable sort would order even them in the same way everywhere
    words = np.random.PCG64(np.random.SeedSequence([_DOMAIN, seed % 2**64, epoch])).random_raw(num)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


class StepBatches(Sampler[list[int]]):
    """Batch sampler of one rank: yields the window indices of each micro-batch, step after step.

    Iterating always starts at ``start_step``. ``len()`` is the number of micro-batches that are left.

    Args:
        windows: The windows; only their number is used.
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
        self.num = len(windows)
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world, self.seed = rank, world, seed
        self.start_step, self.total_steps = start_step, total_steps
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step) * (self.global_batch // self.world // self.micro_batch)

    def __iter__(self) -> Iterator[list[int]]:
        share = self.global_batch // self.world
        for step in range(self.start_step, self.total_steps):
            # ranks take neighbouring shares of the step, each in the stream's order, so all ranks together take the same windows for any
            # world size
            first = step * self.global_batch + self.rank * share
            mine = self.positions(first, share)
            for begin in range(0, share, self.micro_batch):
                yield mine[begin : begin + self.micro_batch]

    def positions(self, first: int, count: int) -> list[int]:
        """Windows at positions ``first .. first + count - 1`` of the endless stream."""
        taken: list[int] = []
        while len(taken) < count:
            epoch, offset = divmod(first + len(taken), self.num)
            # one permutation in memory at a time; a step may begin in one epoch and end in the next
            if epoch != self._epoch:
                self._epoch, self._order = epoch, sample_order(self.num, self.seed, epoch)
            taken += self._order[offset : offset + count - len(taken)].tolist()
        return taken
