"""The learning rate of each step."""

import pytest

from decoct.trainer.schedule import Schedule, default_warmup, learning_rate


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
