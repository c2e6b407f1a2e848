"""How a global batch is cut, the learning rate of each step, and seeds by name."""

import pytest

from decoct.models.common.errors import UserError
from decoct.trainer.plan import (
    BatchPlan,
    Schedule,
    default_step_windows,
    default_warmup,
    derive_batch,
    derive_seed,
    divisors,
    learning_rate,
)


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


@pytest.mark.parametrize(
    ("tokens", "seq_length", "processes", "windows"),
    [
        (1_000_000, 512, 1, 7),  # 279 steps
        (1_000_000, 2048, 1, 1),  # 488 steps of one window
        (100_000_000, 2048, 1, 32),  # never more than 32
        (1_000_000, 512, 4, 4),  # a whole number of windows for each process
        (1_000_000, 512, 64, 64),  # at least one for each
        (100, 512, 1, 1),
    ],
)
def test_steps_are_small_until_there_are_256(tokens: int, seq_length: int, processes: int, windows: int) -> None:
    assert default_step_windows(tokens, seq_length, processes) == windows


@pytest.mark.parametrize("micro", [5, 0, -1, 100])
def test_micro_batch_that_does_not_divide_names_those_that_do(micro: int) -> None:
    nearest = {5: "4 or 6", 0: "1 or 2", -1: "1 or 2", 100: "6 or 12"}[micro]
    with pytest.raises(UserError, match=rf"trainer\.micro_batch={micro} must divide the 12 windows .*use {nearest}, or auto"):
        derive_batch(12 * 64, 64, 1, micro)


@pytest.mark.parametrize("number", [1, 2, 12, 97, 36])
def test_divisors_are_all_of_them(number: int) -> None:
    assert divisors(number) == [size for size in range(1, number + 1) if number % size == 0]


def rates(total: int, warmup: float = 0.1, schedule: Schedule = "cosine", final: float = 0.1) -> list[float]:
    return [learning_rate(step, total, 2.0, warmup, schedule, final) for step in range(total)]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_rate_rises_to_the_peak_and_ends_at_its_final_share(schedule: Schedule) -> None:
    got = rates(41, schedule=schedule)
    assert got[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert got[4:] == sorted(got[4:], reverse=True)
    assert got[22] == pytest.approx((2.0 + 0.2) / 2)
    assert got[-1] == pytest.approx(0.2)


def test_cosine_and_linear_differ_away_from_the_middle() -> None:
    assert rates(41)[13] == pytest.approx(0.2 + 1.8 * (1 + 2**-0.5) / 2)
    assert rates(41, schedule="linear")[13] == pytest.approx(0.2 + 1.8 * 0.75)


def test_constant_stays_at_the_peak() -> None:
    assert rates(10, schedule="constant", warmup=0.3)[3:] == [2.0] * 7


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("total", [1, 2, 3, 20])
def test_short_stages_reach_the_peak_and_never_stop_learning(schedule: Schedule, warmup: float, total: int) -> None:
    got = rates(total, warmup, schedule)
    assert max(got) == 2.0
    assert min(got) > 0


def test_steps_past_the_end_keep_the_last_rate() -> None:
    assert learning_rate(50, 20, 2.0, 0.1, "cosine", 0.0) == 0.0
    assert learning_rate(19, 20, 2.0, 0.1, "cosine", 0.0) == pytest.approx(0.0)


def test_warm_up_share_is_not_lost_to_rounding() -> None:
    """0.29 * 100 is 28.999... in floating point."""
    assert learning_rate(28, 100, 1.0, 0.29, "constant", 0.1) < 1.0
    assert learning_rate(29, 100, 1.0, 0.29, "constant", 0.1) == 1.0


@pytest.mark.parametrize(
    ("total", "rising"), [(1, 0), (2, 1), (4, 2), (8, 4), (15, 7), (16, 8), (17, 8), (49, 8), (160, 8), (161, 8), (200, 10), (10_000, 500)]
)
def test_a_short_stage_has_eight_steps_to_rise_or_half_of_them(total: int, rising: int) -> None:
    """AdamW's first step at the full rate throws away a start that is near its teacher."""
    got = rates(total, default_warmup(total))
    assert got[: rising + 1] == pytest.approx([2.0 * (step + 1) / (rising + 1) for step in range(rising + 1)])
    assert all(rate < 2.0 for rate in got[rising + 1 :])


def test_names_are_kept_apart() -> None:
    assert derive_seed(1, "a", 12) != derive_seed(1, "a", 1, 2)
    assert 0 <= derive_seed(0, "x") < 2**63
