"""How a global batch is cut."""

import pytest

from decoct.models.common.errors import UserError
from decoct.trainer.batch import BatchPlan, derive_batch, divisors


@pytest.mark.parametrize(
    ("tokens", "seq_length", "world", "micro", "expected"),
    [
        (65_536, 512, 1, "auto", (128, 16, 8)),
        (65_536, 512, 4, "auto", (128, 16, 2)),
        (1536, 256, 1, "auto", (6, 6, 1)),
        (12 * 2048, 2048, 1, "auto", (12, 4, 3)),
        (7 * 4096, 4096, 1, "auto", (7, 1, 7)),
        (4 * 16_384, 16_384, 2, "auto", (4, 1, 2)),
        (65_536, 512, 2, 64, (128, 64, 1)),
        (65_536, 512, 2, 1, (128, 1, 64)),
    ],
)
def test_micro_batch_is_the_largest_that_fits_and_divides(
    tokens: int, seq_length: int, world: int, micro: int, expected: tuple[int, int, int]
) -> None:
    plan = derive_batch(tokens, seq_length, world, micro)
    assert plan == BatchPlan(global_windows=expected[0], micro_batch=expected[1], accumulation=expected[2])
    assert plan.micro_batch * plan.accumulation * world * seq_length == tokens


def test_uneven_global_batch_names_the_nearest_values() -> None:
    with pytest.raises(UserError, match=r"trainer\.global_batch_tokens=65,000 must be a multiple of 512 .*use 64,512 or 65,024"):
        derive_batch(65_000, 512, 1, "auto")
    with pytest.raises(UserError, match=r"=1,536 must be a multiple of 1,024 \(data\.seq_length=512 x 2 processes\); use 1,024 or 2,048"):
        derive_batch(1536, 512, 2, "auto")
    for tokens in (100, 0, -512):
        with pytest.raises(UserError, match=r"must be a multiple of 512 .*; use 512$"):
            derive_batch(tokens, 512, 1, "auto")


@pytest.mark.parametrize("micro", [5, 0, -1, 100])
def test_micro_batch_that_does_not_divide_names_those_that_do(micro: int) -> None:
    nearest = {5: "4 or 6", 0: "1 or 2", -1: "1 or 2", 100: "6 or 12"}[micro]
    with pytest.raises(UserError, match=rf"trainer\.micro_batch={micro} must divide the 12 windows .*use {nearest}, or auto"):
        derive_batch(12 * 64, 64, 1, micro)


@pytest.mark.parametrize("number", [1, 2, 12, 97, 36])
def test_divisors_are_all_of_them(number: int) -> None:
    assert divisors(number) == [size for size in range(1, number + 1) if number % size == 0]
