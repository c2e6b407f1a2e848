"""The causal shift."""

import pytest
import torch

from decoct.losses.shift import MASKED, shift_for_next_token


def test_position_i_meets_label_i_plus_one() -> None:
    labels = torch.tensor([[10, 11, 12], [20, 21, MASKED]])
    hidden = labels.unsqueeze(-1).float()
    rows, targets = shift_for_next_token(hidden, labels)
    assert rows.squeeze(-1).tolist() == [10, 11, 20, 21]
    assert targets.tolist() == [11, 12, 21, MASKED]


def test_one_position_predicts_nothing() -> None:
    rows, targets = shift_for_next_token(torch.zeros(3, 1, 4), torch.zeros(3, 1, dtype=torch.int64))
    assert rows.shape == (0, 4)
    assert targets.shape == (0,)


def test_gradients_reach_all_but_the_last_position() -> None:
    hidden = torch.ones(2, 3, 1, requires_grad=True)
    shift_for_next_token(hidden, torch.zeros(2, 3, dtype=torch.int64))[0].sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.squeeze(-1).tolist() == [[1, 1, 0], [1, 1, 0]]


def test_shifted_labels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 1\).*\(2, 2\).*not shifted"):
        shift_for_next_token(torch.ones(2, 3, 1), torch.zeros(2, 2, dtype=torch.int64))
