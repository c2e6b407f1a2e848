"""Exact numbers of kept weights in rows, groups and matrices, against a loop over Python's sort."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decoct.models.common.errors import NonFiniteError
from decoct.models.pruning import selection
from decoct.models.pruning.pattern import Pattern
from decoct.models.pruning.selection import exact_count, follows, largest, largest_in_rows, magnitude_pattern_mask, pattern_mask


def best(scores: list[float], count: int, allowed: list[bool]) -> list[bool]:
    """Which scores stay: the largest, of equal ones the first, none that is not allowed. Python's sort is stable."""
    order = sorted((place for place in range(len(scores)) if allowed[place]), key=lambda place: -scores[place])
    return [place in order[:count] for place in range(len(scores))]


def oracle(scores: np.ndarray, count: int, group: int, allowed: np.ndarray) -> np.ndarray:
    """``best`` of every ``group`` consecutive columns of each row."""
    mask = np.zeros(scores.shape, dtype=bool)
    for row in range(scores.shape[0]):
        for at in range(0, scores.shape[1], group):
            piece = slice(at, at + group)
            mask[row, piece] = best(scores[row, piece].tolist(), count, allowed[row, piece].tolist())
    return mask


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    levels=st.sampled_from([1, 2, 50]),
    pattern=st.sampled_from([(2, 4), (1, 2), (3, 7), (4, 8), (1, 3)]),
    free=st.sampled_from([0.3, 0.9, 1.0]),
    transposed=st.booleans(),
)
def test_groups_rows_and_matrices_keep_exactly_the_largest(
    seed: int, levels: int, pattern: tuple[int, int], free: float, transposed: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = 5, 3 * pattern[1]

    def drawn(high: int) -> Tensor:
        # few levels give many ties; a transposed matrix is not contiguous
        shape = (columns, rows) if transposed else (rows, columns)
        made = torch.randint(-levels if high < 0 else 0, abs(high) + 1, shape, generator=generator)
        return made.T if transposed else made

    scores, allowed = drawn(-levels).float(), drawn(999) < free * 1000
    values, permitted = scores.numpy(), allowed.numpy()
    n_m = Pattern(*pattern)
    assert (pattern_mask(scores, n_m, allowed).numpy() == oracle(values, n_m.kept, n_m.group, permitted)).all()
    count = exact_count(0.4, columns)
    assert (largest_in_rows(scores, count, allowed).numpy() == oracle(values, count, columns, permitted)).all()
    flat = best(values.flatten().tolist(), 11, permitted.flatten().tolist())
    assert largest(scores, 11, allowed).flatten().tolist() == flat
    if free == 1.0:
        assert torch.equal(pattern_mask(scores, n_m), pattern_mask(scores, n_m, allowed))


def test_pieces_of_a_large_matrix_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(37, 12, generator=torch.Generator().manual_seed(0))
    expected = largest_in_rows(scores, 5)
    monkeypatch.setattr(selection, "_PIECE", 30)
    assert torch.equal(largest_in_rows(scores, 5), expected)


def test_rows_that_a_rank_does_not_hold_have_an_empty_mask() -> None:
    assert magnitude_pattern_mask("w", torch.empty(0, 8), Pattern(2, 4)).shape == (0, 8)


@pytest.mark.parametrize(("keep", "total", "count"), [(0.5, 5, 2), (0.5, 7, 4), (1e-9, 100, 1), (1.0, 3, 3), (0.3, 63, 19)])
def test_counts_are_rounded_and_at_least_one(keep: float, total: int, count: int) -> None:
    assert exact_count(keep, total) == count


def test_a_pattern_is_checked_in_every_group() -> None:
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3], [0, 0, 0, 0, 4, 5, 0, 0]])
    assert follows(weight, Pattern(2, 4)) and not follows(weight, Pattern(1, 4))
    assert not follows(weight, Pattern(2, 3))
    weight[1, 6] = 1e-30
    assert not follows(weight, Pattern(2, 4))


def test_numbers_that_cannot_be_compared_are_refused_by_name() -> None:
    weight = torch.ones(4, 8)
    weight[2, 3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layers\.0\.up holds NaN or infinite weights"):
        magnitude_pattern_mask("layers.0.up", weight, Pattern(2, 4))
