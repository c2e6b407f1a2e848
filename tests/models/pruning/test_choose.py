"""The best by score: ties, order, and the same number in every group of heads."""

import pytest
import torch

from decoct.models.pruning.choose import best, best_heads, kept_by
from decoct.models.pruning.scores import Scores
from decoct.models.sizes import Sizes

BEFORE = Sizes(ffn=6, heads=6, kv_heads=2, hidden=5, layers=3, head_dim=4)


def after(**changed: int) -> Sizes:
    return Sizes(**{**BEFORE.record(), **changed})


def test_the_best_stay_in_order_and_ties_go_to_the_first() -> None:
    assert best(torch.ones(6), 2) == [0, 1]
    assert best(torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0, 0.0]), 3) == [1, 3, 4]
    assert best(torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0, 0.0]), 2) == [1, 3]
    assert best(torch.arange(6.0), 6) == list(range(6))


def test_every_group_keeps_the_same_number_of_its_best_heads() -> None:
    # the three best heads are all of the first group, which has two of them
    heads = torch.tensor([9.0, 8.0, 7.0, 1.0, 3.0, 2.0])
    assert best_heads(heads, torch.tensor([24.0, 6.0]), BEFORE, after(heads=4)) == ([0, 1, 4, 5], [0, 1])
    assert best_heads(heads, torch.tensor([24.0, 6.0]), BEFORE, after(heads=2)) == ([0, 4], [0, 1])


def test_whole_groups_take_their_heads_along() -> None:
    heads = torch.tensor([9.0, 8.0, 7.0, 1.0, 3.0, 2.0])
    # the group is ranked by its own score, not by its heads
    assert best_heads(heads, torch.tensor([1.0, 2.0]), BEFORE, after(heads=3, kv_heads=1)) == ([3, 4, 5], [1])
    assert best_heads(heads, torch.tensor([2.0, 1.0]), BEFORE, after(heads=2, kv_heads=1)) == ([0, 1], [0])


def test_only_axes_that_get_smaller_are_chosen_and_only_kept_layers_count() -> None:
    scores = Scores(
        axes={"ffn": [torch.arange(6.0), torch.zeros(6), -torch.arange(6.0)]},
        hidden=[torch.tensor([0.0, 1, 0, 0, 0]), torch.tensor([0.0, 0, 9, 0, 0]), torch.zeros(5), torch.tensor([0.0, 0, 0, 0, 0.5])],
    )
    kept = kept_by(scores, [0, 2], BEFORE, after(layers=2, ffn=2, hidden=2))
    assert kept.ffn == [[4, 5], [0, 1]]
    # channel 2 was read by layer 1 alone, which is gone
    assert kept.hidden == [1, 4]
    assert kept.heads is None
    assert kept.kv_heads is None
    assert kept.sizes(BEFORE) == after(layers=2, ffn=2, hidden=2)
    assert kept_by(scores, [0, 1, 2], BEFORE, after(hidden=2)).hidden == [1, 2]


def test_scores_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="scores of ffn have shapes"):
        kept_by(Scores(axes={"ffn": [torch.ones(7)] * 3}), [0, 1, 2], BEFORE, after(ffn=2))
