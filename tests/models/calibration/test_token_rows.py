"""Vectors of tokens are found in every shape that families give them, and padding is left out of each."""

import pytest
import torch

from decoct.models.calibration.token_rows import token_rows

X = torch.arange(2 * 3 * 4, dtype=torch.float32).reshape(2, 3, 4)
TEXT = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.parametrize("shape", [(2, 3, 4), (6, 4), (2, 1, 3, 4), (2, 3, 1, 4), (6, 1, 4)])
def test_rows_are_the_tokens_in_order(shape: tuple[int, ...]) -> None:
    rows = token_rows(X.reshape(shape), None, (2, 3))
    assert rows is not None
    assert torch.equal(rows, X.reshape(6, 4))
    kept = token_rows(X.reshape(shape), TEXT, (2, 3))
    assert kept is not None
    assert torch.equal(kept, X[TEXT])


def test_several_vectors_for_each_token_stay_with_it() -> None:
    rows = token_rows(X.reshape(2, 3, 2, 2), TEXT, (2, 3))
    assert rows is not None
    assert torch.equal(rows, X[TEXT].reshape(6, 2))


@pytest.mark.parametrize("shape", [(3, 2, 4), (4, 6), (12, 2), (24,)])
def test_other_shapes_are_no_tokens(shape: tuple[int, ...]) -> None:
    assert token_rows(X.reshape(shape), TEXT, (2, 3)) is None


def test_one_window_and_one_token() -> None:
    assert token_rows(X[:1], None, (1, 3)) is not None
    assert token_rows(torch.ones(1, 4), None, (1, 1)) is not None
    assert token_rows(torch.ones(5, 4), None, (1, 3)) is None
