import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoct.trainer.soft_targets.bits import (
    ascending_width,
    fold_ascending,
    fold_bits,
    from_bytes,
    low_width,
    to_bytes,
    unfold_ascending,
    unfold_bits,
)


@given(st.integers(1, 20), st.lists(st.integers(0, 2**20 - 1), min_size=1, max_size=9))
def test_numbers_come_back_from_bytes(width: int, numbers: list[int]) -> None:
    values = torch.tensor([[number % 2**width for number in numbers]] * 3)
    bits = unfold_bits(values, width)
    assert bits.shape == (3, width * len(numbers))
    back = from_bytes(to_bytes(bits))[:, : bits.shape[1]]
    assert torch.equal(fold_bits(back, width), values)


def test_bits_lie_lowest_first() -> None:
    assert to_bytes(unfold_bits(torch.tensor([[0b101, 0b001]]), 3)).tolist() == [[0b001101]]


@settings(deadline=None)
@given(st.integers(1, 200_000), st.data())
def test_ascending_numbers_come_back(limit: int, data: st.DataObject) -> None:
    numbers = st.lists(st.integers(0, limit), min_size=1, max_size=12).map(sorted)
    first = data.draw(numbers)
    other = sorted(limit - number for number in first)
    values = torch.tensor([first, other])
    bits = unfold_ascending(values, limit)
    assert bits.shape == (2, ascending_width(len(first), limit))
    assert torch.equal(fold_ascending(bits, len(first), limit), values)


def test_a_set_of_ids_takes_little_more_than_its_information() -> None:
    # log2(C(128256, 46)) = 590 bits; plain ids of 17 bits would take 782
    assert ascending_width(46, 128_256) <= 616


def test_a_number_too_many_in_one_row_and_too_few_in_another_are_found() -> None:
    bits = unfold_ascending(torch.tensor([[3, 70, 90], [1, 5, 99]]), 100)
    high = bits[:, 3 * low_width(3, 100) :]
    high[0, int(high[0].nonzero()[0])] = 0
    high[1, int((high[1] == 0).nonzero()[0])] = 1
    with pytest.raises(ValueError, match=r"^2 of 2 rows do not have 3 numbers$"):
        fold_ascending(bits, 3, 100)
