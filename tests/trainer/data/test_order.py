"""Every window exactly once an epoch, whatever the world, the micro-batch, and however often a run was stopped."""

from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pytest

from decoct.trainer.data.blend import Blend
from decoct.trainer.data.order import StepBatches, WindowOrder, sample_order

NUM, GLOBAL, STEPS = 37, 8, 14
GOLDEN = [1, 2, 3, 7, 0, 4, 5, 6]


def batches(rank: int = 0, world: int = 1, micro: int = 4, start: int = 0, seed: int = 5, num: int = NUM) -> StepBatches:
    return StepBatches(
        range(num), global_batch=GLOBAL, micro_batch=micro, rank=rank, world=world, seed=seed, start_step=start, total_steps=STEPS
    )


def steps(world: int, micro: int, start: int = 0) -> list[list[int]]:
    """Windows of each step over all ranks, in stream order."""
    every = [list(batches(rank, world, micro, start)) for rank in range(world)]
    count = GLOBAL // world // micro
    return [[index for rank in every for batch in rank[at : at + count] for index in batch] for at in range(0, len(every[0]), count)]


def test_order_is_a_permutation_that_seed_and_epoch_decide() -> None:
    orders = {(seed, epoch): sample_order(NUM, seed, epoch).tolist() for seed in (0, 1, -3) for epoch in (0, 1)}
    assert all(sorted(order) == list(range(NUM)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 6
    assert sample_order(NUM, 1, 1).tolist() == orders[1, 1]


def test_order_never_changes_between_versions() -> None:
    """A resumed run must go on in the order in which it began, also after an upgrade."""
    assert sample_order(8, 0, 0).tolist() == GOLDEN


@pytest.mark.parametrize("num", [1, 3, NUM, 200])
def test_stream_takes_each_window_once_an_epoch(num: int) -> None:
    stream = list(chain.from_iterable(batches(num=num)))
    assert len(stream) == GLOBAL * STEPS
    for first in range(0, len(stream), num):
        epoch = Counter(stream[first : first + num])
        assert set(epoch.values()) == {1}
        assert first + num > len(stream) or len(epoch) == num


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (4, 1)])
def test_each_step_is_the_same_windows_for_every_world_and_micro_batch(world: int, micro: int) -> None:
    assert steps(world, micro) == steps(1, 4)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 1, 5, STEPS])
def test_resuming_anywhere_gives_the_identical_tail(world: int, start: int) -> None:
    assert steps(world, 2, start) == steps(1, 4)[start:]


def test_iterating_again_starts_again_and_length_counts_micro_batches() -> None:
    sampler = batches(rank=1, world=2, micro=2, start=3)
    first = list(sampler)
    assert list(sampler) == first
    assert len(sampler) == len(first) == (STEPS - 3) * 2
    assert len(batches(start=STEPS + 1)) == 0


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="global_batch=8 is not a multiple of world=3"):
        batches(world=3, micro=1)
    with pytest.raises(ValueError, match="no windows"):
        batches(num=0)
    with pytest.raises(ValueError, match="rank=2"):
        batches(rank=2, world=2)


def test_indices_are_plain_ints() -> None:
    assert all(type(index) is int for index in next(iter(batches())))
    assert not isinstance(next(iter(batches()))[0], np.integer)


class _Blended:
    """Windows of three texts."""

    blend = Blend(("a", "b", "c"), (40, 7, 3), (5, 2, 1))

    def __len__(self) -> int:
        return 50


def test_each_text_of_a_blend_has_epochs_of_its_own() -> None:
    taken = WindowOrder(_Blended(), 3).at(0, 8 * 20)
    for first, size, count in ((0, 40, 100), (40, 7, 40), (47, 3, 20)):
        own = [index - first for index in taken if first <= index < first + size]
        assert len(own) == count
        for begin in range(0, count, size):
            assert len(set(own[begin : begin + size])) == min(size, count - begin)
        assert own[:size] != own[size : 2 * size], "each epoch has an order of its own"


@pytest.mark.parametrize("first", [0, 5, 77])
def test_any_stretch_of_a_blend_is_that_of_the_whole_stream(first: int) -> None:
    assert WindowOrder(_Blended(), 3).at(first, 30) == WindowOrder(_Blended(), 3).at(0, 200)[first : first + 30]


@pytest.mark.parametrize("windows", [_Blended(), range(50)], ids=["blend", "one text"])
def test_once_seen_and_repeats_follow_from_the_stream(windows: Any) -> None:
    order = WindowOrder(windows, 3)
    once = list(order.once())
    assert sorted(once) == list(range(50))
    stream = order.at(0, 5000)
    assert once == list(dict.fromkeys(stream))
    for count in (1, 13, 24, 25, 50, 51, 200):
        assert order.seen(count) == sorted(set(stream[:count]))
        assert order.repeats(count) == (len(set(stream[:count])) < count)
