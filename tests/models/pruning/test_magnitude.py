"""Magnitude masks: exact counts, ties, nesting, scopes and the schedule."""

import itertools
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoct.models.common.errors import NonFiniteError
from decoct.models.pruning import cubic_keep, magnitude_masks, sparsity, zero_masks


def _oracle(weight: torch.Tensor, count: int) -> torch.Tensor:
    """The largest magnitudes by a stable sort."""
    order = torch.sort(weight.float().abs().flatten(), descending=True, stable=True).indices
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view(weight.shape)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    levels=st.sampled_from([1, 2, 7, 10**6]),
    keep=st.floats(0.01, 1.0),
    scale=st.sampled_from([1e-40, 1e-3, 1e30]),
)
def test_masks_equal_a_stable_sort_whatever_the_ties_and_sizes(seed: int, levels: int, keep: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-levels, levels + 1, (13, 17), generator=generator).float() * scale
    mask = magnitude_masks({"w": weight}, keep, "layer", None)["w"]
    assert torch.equal(mask, _oracle(weight, max(1, round(keep * 221))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_equal_weights_keep_exactly_k_first(dtype: torch.dtype) -> None:
    mask = magnitude_masks({"w": torch.full((4, 5), -0.5, dtype=dtype)}, 0.35, "layer", None)["w"]
    assert mask.flatten().nonzero().flatten().tolist() == list(range(7))


def test_transposed_storage_is_ranked_by_logical_index() -> None:
    weight = torch.ones(5, 4).T
    assert magnitude_masks({"w": weight}, 0.25, "layer", None)["w"].nonzero().tolist() == [[0, column] for column in range(5)]


def test_layer_scope_counts_inside_each_matrix() -> None:
    weights = {"big": torch.randn(8, 8) * 100, "small": torch.randn(6, 8)}
    masks = magnitude_masks(weights, 0.25, "layer", None)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"big": 16, "small": 12}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_masks_are_nested_and_what_was_pruned_never_returns(scope: Literal["layer", "global"]) -> None:
    weights = {name: torch.randn(16, 16, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("ab")}
    current = magnitude_masks(weights, 0.7, scope, None)
    for keep in (0.6, 0.6, 0.3, 0.5):
        # training moves the weights between updates: pruned positions would now win if they could
        weights = {name: torch.where(current[name], torch.randn(16, 16) * 0.1, 10.0) for name in weights}
        following = magnitude_masks(weights, keep, scope, current)
        assert all(not bool((following[name] & ~current[name]).any()) for name in weights)
        kept = sum(int(mask.sum()) for mask in following.values())
        before = sum(int(mask.sum()) for mask in current.values())
        assert kept == min(before, sum(round(keep * 256) for _ in weights) if scope == "layer" else round(keep * 512))
        current = following


def test_global_scope_keeps_exactly_k_and_does_not_see_the_scale_of_a_matrix() -> None:
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    other = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    one = magnitude_masks({"a": weight, "b": other}, 0.4, "global", None)
    two = magnitude_masks({"a": weight * 1024, "b": other}, 0.4, "global", None)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert sum(int(mask.sum()) for mask in one.values()) == round(0.4 * 1536)


def test_ties_across_matrices_go_to_the_first() -> None:
    masks = magnitude_masks({"a": torch.ones(10, 10), "b": torch.ones(10, 10)}, 0.6, "global", None)
    # 5 % of each are spared first, then index order decides
    assert (int(masks["a"].sum()), int(masks["b"].sum())) == (100, 20)
    assert masks["b"].flatten().nonzero().flatten().tolist() == list(range(20))


def test_global_scope_cuts_even_matrices_less_and_spares_five_percent_of_the_peaked_one() -> None:
    even = torch.ones(20, 20)
    peaked = torch.zeros(20, 20)
    peaked[0, 0] = 1.0
    masks = magnitude_masks({"peaked": peaked, "even": even}, 0.3, "global", None)
    assert int(masks["peaked"].sum()) == 20
    assert bool(masks["peaked"][0, 0])
    assert int(masks["even"].sum()) == 240 - 20


def test_dead_matrix_does_not_disturb_the_global_cut() -> None:
    masks = magnitude_masks({"dead": torch.zeros(10, 10), "live": torch.rand(10, 10) + 1}, 0.5, "global", None)
    assert int(masks["live"].sum()) + int(masks["dead"].sum()) == 100
    assert int(masks["dead"].sum()) == 5


def test_non_finite_weight_is_named() -> None:
    with pytest.raises(NonFiniteError, match=r"layers\.0\.q holds NaN"):
        magnitude_masks({"layers.0.q": torch.tensor([[1.0, float("nan")]])}, 0.5, "layer", None)


def test_zero_masks_and_sparsity_count_exact_zeros() -> None:
    weights = {"a": torch.tensor([[0.0, -0.0, 1e-45]]), "b": torch.ones(1, 5)}
    assert zero_masks(weights)["a"].tolist() == [[False, False, True]]
    assert sparsity(weights) == 2 / 8
    assert sparsity({}) == 0.0


def test_schedule_is_cubic_and_frozen_for_the_heal_phase() -> None:
    values = [cubic_keep(step, 100, 0.4, 0.25, 5) for step in range(101)]
    assert values[0] == 1.0
    assert values[25] == pytest.approx(1 - 0.6 * (1 - (2 / 3) ** 3))
    assert values[74] > 0.4
    assert values[75:] == [0.4] * 26
    assert all(a >= b for a, b in itertools.pairwise(values))
    changes = [step for step in range(1, 101) if values[step] != values[step - 1]]
    assert changes == list(range(5, 80, 5))


@settings(max_examples=200, deadline=None)
@given(total=st.integers(1, 300), keep=st.floats(0.01, 0.99), heal=st.floats(0, 0.99), update_every=st.integers(1, 400))
def test_schedule_always_starts_dense_and_reaches_keep_exactly(total: int, keep: float, heal: float, update_every: int) -> None:
    values = [cubic_keep(step, total, keep, heal, update_every) for step in range(total + 1)]
    assert values[0] == 1.0
    assert values[-1] == keep
    assert all(1.0 >= a >= b >= keep for a, b in itertools.pairwise(values))
    last_change = max(step for step in range(1, total + 1) if values[step] != values[step - 1])
    assert last_change <= max(1, total * (1 - heal) + 1e-6)
