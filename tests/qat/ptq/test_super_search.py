"""Searched scales of super-blocks: never worse than rounding to nearest, better on real weights, and weighted by importance."""

import pytest
import torch
from torch import Tensor

from decoct.qat.codes.code_checks import grid_problem
from decoct.qat.fake_quant import Encoded
from decoct.qat.fake_quant.super_blocks import super_codes_with
from decoct.qat.fake_quant.super_reference import kept_weights, scales_of_weight
from decoct.qat.ptq import super_search
from decoct.qat.ptq.super_search import SuperScales, searched_super, super_error
from decoct.qat.spec import QuantSpec

KINDS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")


def some_weights(rows: int = 24, columns: int = 512) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.05
    weight[1], weight[2], weight[3] = weight[1].abs(), -weight[2].abs(), 0
    weight[4, 5] = 3.0
    weight[5, :256] = 0
    return weight


def by_block(weight: Tensor, found: SuperScales, kind: str, importance: Tensor | None = None) -> Tensor:
    """Squared error of each super-block, one after the other."""
    columns = weight.shape[1]
    parts = []
    for start in range(0, columns, 256):
        many = found.sub.scales.shape[1] * 256 // columns
        first = start // 256
        inside = slice(first * many, (first + 1) * many)
        sub = found.sub._replace(
            scales=found.sub.scales[:, inside],
            minimum=None if found.sub.minimum is None else found.sub.minimum[:, first : first + 1],
            minimums=None if found.sub.minimums is None else found.sub.minimums[:, inside],
        )
        for row in range(len(weight)):
            own = SuperScales(found.scales[row : row + 1, first : first + 1], sub.rows(slice(row, row + 1)))
            share = None if importance is None else importance[start : start + 256]
            parts.append(super_error(weight[row : row + 1, start : start + 256], own, kind, share))
    return torch.stack(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_no_super_block_gets_worse_and_the_whole_gets_better(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, spec = some_weights(), QuantSpec(kind=kind)  # pyright: ignore[reportArgumentType]
    nearest = SuperScales(*scales_of_weight(kept_weights(weight, None), kind))
    found = searched_super(weight, kind)
    before, after = by_block(weight, nearest, kind), by_block(weight, found, kind)
    # both errors are summed in other orders than in the search
    assert bool((after <= before * (1 + 1e-5)).all())
    # measured on normal weights: 0.64, 0.87, 0.82, 0.84 and 0.82
    assert float(after.sum() / before.sum()) < 0.92
    codes = super_codes_with(weight, found.scales, found.sub, spec)
    assert grid_problem(Encoded(codes, found.scales, sub=found.sub), spec) is None
    # the pieces of work do not change the result
    monkeypatch.setattr(super_search, "_PIECE", 512 * 5)
    again = searched_super(weight, kind)
    assert torch.equal(again.scales, found.scales)
    assert torch.equal(again.sub.scales, found.sub.scales)


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_lowers_the_error(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = some_weights()
    errors = []
    for turns in (0, 1, 2):
        monkeypatch.setattr(super_search, "TURNS", turns)
        errors.append(float(super_error(weight, searched_super(weight, kind), kind)))
    assert errors[0] > errors[1] >= errors[2]


@pytest.mark.parametrize("kind", KINDS)
def test_importance_lowers_the_weighted_error(kind: str) -> None:
    weight = some_weights()
    importance = torch.rand(512, generator=torch.Generator().manual_seed(4)) ** 4
    importance[7] = 0
    plain, weighted = searched_super(weight, kind), searched_super(weight, kind, None, importance)
    ratio = super_error(weight, weighted, kind, importance) / super_error(weight, plain, kind, importance)
    assert float(ratio) < 0.95
    # nothing is known: no input counts, and every choice is as good as rounding to nearest
    nothing = searched_super(weight, kind, None, torch.zeros(512))
    assert torch.equal(nothing.scales, scales_of_weight(weight, kind)[0])


def test_pruned_weights_do_not_count() -> None:
    weight = some_weights()
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) > 0.5
    found, other = searched_super(weight, "q6_k", mask), searched_super(weight * mask, "q6_k")
    assert torch.equal(found.scales, other.scales)
    assert torch.equal(found.sub.scales, other.sub.scales)


def test_an_empty_matrix_has_no_scales() -> None:
    assert searched_super(torch.zeros(0, 256), "q4_k").scales.shape == (0, 1)
