"""Standard errors over blocks of text."""

import math

import numpy as np
import pytest

from decoct.trainer.evaluation.spread import MOST_BLOCKS, block_sums, errors_of, is_clear, paired_error, standard_error


def test_error_is_how_far_means_of_other_texts_would_lie() -> None:
    """Against the spread of means over many texts of the same kind, whose blocks differ far more than their tokens."""
    draw = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(400):
        level = draw.normal(2.0, 1.0, 40)
        sizes = draw.integers(20, 60, 40)
        figures = np.repeat(level, sizes) + draw.normal(0.0, 0.1, sizes.sum())
        sums = block_sums(sizes.tolist(), {"nll": figures})
        means.append(figures.mean())
        errors.append(standard_error(sums["nll"], sums["tokens"]))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
    assert np.mean(errors) > 4 / math.sqrt(1600), "tokens of a block are not independent"


def test_equal_blocks_give_the_error_of_a_mean() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    expected = np.std(values, ddof=1) / 2
    assert standard_error([10 * value for value in values], [10.0] * 4) == pytest.approx(expected)
    assert standard_error([10 * value for value in values] + [0.0], [10.0] * 4 + [0.0]) == pytest.approx(expected), "an empty block"


def test_no_error_where_there_is_none() -> None:
    assert standard_error([3.0], [4.0]) is None
    assert standard_error([3.0, math.inf], [4.0, 4.0]) is None
    assert standard_error(None, [4.0]) is None
    one = block_sums([4], {"nll": np.ones(4), "kl": None, "top1": None})
    assert errors_of(one, math.e) == {"perplexity_se": None, "kl_se": None, "top1_se": None}


def test_error_of_the_perplexity_is_that_of_its_logarithm_times_its_slope() -> None:
    sums = block_sums([2, 2], {"nll": np.array([1.0, 1.0, 2.0, 2.0]), "kl": None, "top1": None})
    assert errors_of(sums, 10.0)["perplexity_se"] == pytest.approx(10 * 0.5)


def test_blocks_are_windows_in_a_row_and_hold_every_token() -> None:
    windows = [3, 0, 2, 5]
    sums = block_sums(windows, {"nll": np.arange(10.0), "kl": None})
    assert sums == {"tokens": [3, 0, 2, 5], "nll": [3, 0, 7, 35], "kl": None}
    many = block_sums([1] * (3 * MOST_BLOCKS), {"nll": np.arange(3.0 * MOST_BLOCKS)})
    assert many["tokens"] == [3] * MOST_BLOCKS
    assert many["nll"] is not None
    assert many["nll"][:2] == [0 + 1 + 2, 3 + 4 + 5]


def test_paired_error_is_that_of_the_difference() -> None:
    draw = np.random.default_rng(1)
    hard, sizes = draw.normal(3.0, 1.0, 50), [20] * 50
    first = block_sums(sizes, {"nll": np.repeat(hard, 20)})
    second = block_sums(sizes, {"nll": np.repeat(hard + draw.normal(0.05, 0.01, 50), 20)})
    error = paired_error(first, second, "nll")
    alone = standard_error(first["nll"], first["tokens"])
    assert error is not None and alone is not None
    assert error == pytest.approx(0.01 / math.sqrt(50), rel=0.3)
    assert error < alone / 50
    assert is_clear(0.05, error)
    assert not is_clear(0.05, alone)


def test_no_pairs_without_the_same_blocks() -> None:
    sums = block_sums([2, 2], {"nll": np.arange(4.0)})
    assert paired_error(sums, block_sums([2, 3], {"nll": np.arange(5.0)}), "nll") is None
    assert paired_error(None, sums, "nll") is None
    assert paired_error({**sums, "nll": [1.0, None]}, sums, "nll") is None  # pyright: ignore[reportArgumentType] - as read from JSON
    assert is_clear(0.5, None) is None
    assert is_clear(math.nan, 0.1), "a broken figure is no chance"
