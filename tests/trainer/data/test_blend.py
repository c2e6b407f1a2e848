"""Which text each position of a blend takes its window from."""

from fractions import Fraction

import numpy as np
import pytest

from decoct.trainer.data.blend import MOST_PERIOD, Blend, largest_remainder, window_counts

COUNTS = [(1,), (1, 1), (3, 7), (1, 99), (5, 3, 1, 1), (13, 1, 7, 29, 2), (1, 1, 1, 1, 996)]


def blend(counts: tuple[int, ...], sizes: tuple[int, ...] | None = None) -> Blend:
    return Blend(tuple(f"t{at}" for at in range(len(counts))), sizes or (10,) * len(counts), counts)


@pytest.mark.parametrize("counts", COUNTS)
def test_every_beginning_has_its_shares_rounded_up_or_down(counts: tuple[int, ...]) -> None:
    made = blend(counts)
    positions = 2 * made.period + 3
    texts, _ = made.places(0, positions)
    for number in range(1, positions + 1):
        found = np.bincount(texts[:number], minlength=len(counts))
        for count, seen in zip(counts, found.tolist(), strict=True):
            assert abs(Fraction(number * count, made.period) - seen) < 1, (number, found)
        assert made.taken(number) == found.tolist()


@pytest.mark.parametrize("counts", COUNTS)
def test_a_stretch_is_found_without_walking_to_it(counts: tuple[int, ...]) -> None:
    made = blend(counts)
    texts, numbers = made.places(0, 3 * made.period)
    seen = [0] * len(counts)
    for text, number in zip(texts.tolist(), numbers.tolist(), strict=True):
        assert number == seen[text]
        seen[text] += 1
    first = made.period + made.period // 2
    later = made.places(first, made.period)
    assert np.array_equal(later[0], texts[first : first + made.period]) and np.array_equal(later[1], numbers[first : first + made.period])


def test_the_order_never_changes_between_versions() -> None:
    assert blend((5, 3, 2)).places(0, 10)[0].tolist() == [0, 1, 0, 2, 0, 1, 0, 2, 1, 0]


def test_windows_and_epochs_of_each_text() -> None:
    made = blend((3, 1), (6, 4))
    assert made.begins.tolist() == [0, 6, 10]
    assert [made.text_of(index) for index in range(10)] == [0] * 6 + [1] * 4
    assert made.epochs(16) == {"t0": 2.0, "t1": 1.0}
    assert made.shares == [0.75, 0.25]


@pytest.mark.parametrize(
    ("weights", "means", "expected"),
    [
        ([0.3, 0.7], [1, 1], (3, 7)),
        ([1, 1, 2], [1, 1, 1], (1, 1, 2)),
        ([0.1, 0.2, 0.7], [1, 1, 1], (1, 2, 7)),
        # shares are of tokens: a text of half-empty windows needs twice as many of them
        ([0.5, 0.5], [512, 256], (1, 2)),
        ([10_000_000.0, 30_000_000.0], [1, 1], (1, 3)),
    ],
)
def test_shares_of_tokens_become_windows_of_a_period(weights: list[float], means: list[int], expected: tuple[int, ...]) -> None:
    assert window_counts([Fraction(repr(weight)) for weight in weights], [Fraction(mean) for mean in means]) == expected


def test_shares_that_need_a_long_period_are_rounded_and_no_text_gets_lost() -> None:
    counts = window_counts([Fraction(333333333, 10**9), Fraction(666666666, 10**9), Fraction(1, 10**9)], [Fraction(1)] * 3)
    assert sum(counts) == MOST_PERIOD
    assert counts[2] == 1
    assert counts[0] / MOST_PERIOD == pytest.approx(1 / 3, abs=1e-4)


@pytest.mark.parametrize(
    ("shares", "total", "least", "expected"),
    [("1/3 1/3 1/3", 10, 0, [4, 3, 3]), ("1/2 1/2", 3, 0, [2, 1]), ("999/1000 1/1000", 100, 1, [99, 1]), ("1/1", 7, 0, [7])],
)
def test_largest_remainders_add_up(shares: str, total: int, least: int, expected: list[int]) -> None:
    assert largest_remainder([Fraction(share) for share in shares.split()], total, least=least) == expected
