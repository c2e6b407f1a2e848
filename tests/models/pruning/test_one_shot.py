"""Wanda and SparseGPT on one linear, against slow implementations in fp64: a sort by row, and an inverse for every column."""

import numpy as np
import pytest
import torch
from torch import Tensor

from decoct.models.calibration.factor import factorize
from decoct.models.common.errors import NonFiniteError
from decoct.models.pruning.pattern import Pattern
from decoct.models.pruning.selection import exact_count, largest, pattern_mask
from decoct.models.pruning.sparsegpt import sparsegpt
from decoct.models.pruning.wanda import wanda_mask


def case(out: int, inputs: int, seed: int = 0, dead: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, inputs [tokens, in], H) with inputs of many sizes that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.eye(inputs)
    # neighbours differ in size, as channels of a model do
    sizes = torch.logspace(-0.7, 0.7, inputs)[torch.randperm(inputs, generator=generator)]
    x = torch.randn(3 * inputs, inputs, generator=generator) @ mixed * sizes
    x[:, list(dead)] = 0
    return torch.randn(out, inputs, generator=generator), x, 2 / len(x) * x.T @ x


def kept_of(costs: np.ndarray, count: int, free: np.ndarray) -> np.ndarray:
    """Mask of the ``count`` largest of all elements by rows, of equal ones the first, none that is not free."""
    flat = [place for place in np.argsort(-costs.flatten(), kind="stable") if free.flatten()[place]]
    mask = np.zeros(costs.size, dtype=bool)
    mask[flat[:count]] = True
    return mask.reshape(costs.shape)


def slow_sparsegpt(
    weight: Tensor, x: Tensor, keep: float, pattern: Pattern | None, free: np.ndarray | None = None, damping: float = 0.01
) -> tuple[np.ndarray, np.ndarray]:
    """Optimal brain surgery from left to right: for every column the inverse of the Hessian of the columns that are left."""
    w = weight.double().numpy().copy()
    out, inputs = w.shape
    free = np.ones(w.shape, dtype=bool) if free is None else free
    h = 2 / len(x) * x.double().numpy().T @ x.double().numpy()
    w[:, np.diag(h) == 0] = 0
    h = h + damping * np.diag(h).mean() * np.eye(inputs)
    left = [np.linalg.inv(h[column:, column:]) for column in range(inputs)]
    spread = np.array([inverse[0, 0] for inverse in left])
    mask = np.zeros(w.shape, dtype=bool)
    size = 128 if pattern is None else 128 // pattern.group * pattern.group
    for start in range(0, inputs, size):
        stop = min(start + size, inputs)
        if pattern is None:
            due = max(1, round(keep * out * stop)) - int(mask.sum())
            mask[:, start:stop] = kept_of(w[:, start:stop] ** 2 / spread[start:stop], due, free[:, start:stop])
        for column in range(start, stop):
            if pattern is not None and column % pattern.group == 0:
                group = slice(column, column + pattern.group)
                for row in range(out):
                    costs = w[row : row + 1, group] ** 2 / spread[group]
                    mask[row, group] = kept_of(costs, pattern.kept, free[row : row + 1, group])[0]
            new = np.where(mask[:, column], w[:, column], 0)
            error = (w[:, column] - new) / spread[column]
            w[:, column:] -= np.outer(error, left[column][0])
            w[:, column] = new
    return w, mask


CASES = [
    (17, 63, 0.5, None),
    (9, 200, 0.3, None),  # more than one block
    (12, 64, 0.5, Pattern(2, 4)),
    (7, 63, 4 / 7, Pattern(4, 7)),  # groups that do not divide 128
    (5, 260, 0.25, Pattern(1, 4)),
    (4, 264, 0.25, Pattern(2, 8)),
]


@pytest.mark.parametrize(("out", "inputs", "keep", "pattern"), CASES)
def test_sparsegpt_is_optimal_brain_surgery_from_left_to_right(out: int, inputs: int, keep: float, pattern: Pattern | None) -> None:
    weight, x, hessian = case(out, inputs)
    factor = factorize(hessian, 0.01, activation_order=False)
    assert factor is not None
    pruned, mask = sparsegpt("w", weight, hessian, factor, keep, pattern)
    expected, expected_mask = slow_sparsegpt(weight, x, keep, pattern)
    assert (mask.numpy() == expected_mask).all()
    torch.testing.assert_close(pruned, torch.from_numpy(expected).float(), rtol=2e-3, atol=2e-4)
    assert torch.equal(pruned != 0, mask)
    assert int(mask.sum()) == exact_count(keep, weight.numel())


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
def test_sparsegpt_keeps_earlier_zeros_and_drops_dead_inputs(pattern: Pattern | None) -> None:
    weight, x, hessian = case(11, 64, seed=1, dead=(5, 40))
    free = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.8
    weight *= free
    factor = factorize(hessian, 0.01, activation_order=False)
    assert factor is not None
    # rows of a larger matrix that lies transposed in memory
    pruned, mask = sparsegpt("w", weight.T.contiguous().T, hessian, factor, 0.5, pattern, free)
    expected, expected_mask = slow_sparsegpt(weight, x, 0.5, pattern, free.numpy())
    assert (mask.numpy() == expected_mask).all()
    torch.testing.assert_close(pruned, torch.from_numpy(expected).float(), rtol=2e-3, atol=2e-4)
    assert not pruned[~free].any() and not pruned[:, [5, 40]].any()
    if pattern is None:
        assert int(mask.sum()) == exact_count(0.5, weight.numel())


def test_a_weight_that_is_equal_everywhere_keeps_the_first_of_each_row_of_a_block() -> None:
    factor = factorize(torch.eye(8), 0.0, activation_order=False)
    assert factor is not None
    _, mask = sparsegpt("w", torch.ones(2, 8), torch.eye(8), factor, 0.5)
    assert mask.tolist() == [[True] * 8, [False] * 8]
    _, mask = sparsegpt("w", torch.ones(2, 8), torch.eye(8), factor, 0.5, Pattern(2, 4))
    assert mask.tolist() == [[True, True, False, False] * 2] * 2


@pytest.mark.parametrize(("out", "inputs", "keep"), [(17, 63, 0.5), (3, 1000, 0.123), (40, 8, 0.99)])
def test_wanda_sorts_magnitude_times_norm_in_every_row(out: int, inputs: int, keep: float) -> None:
    weight, x, hessian = case(out, inputs) if inputs < 1000 else (torch.randn(out, inputs), *case(1, inputs)[1:])
    scores = np.abs(weight.double().numpy()) * np.linalg.norm(x.double().numpy(), axis=0)
    count = max(1, round(keep * inputs))
    mask = wanda_mask("w", weight, hessian, keep)
    for row in range(out):
        order = np.argsort(-scores[row], kind="stable")[:count]
        assert set(mask[row].nonzero().flatten().tolist()) == set(order.tolist())
    # what is zero already is not chosen, also where less than the share is left
    free = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.3
    fewer = wanda_mask("w", weight, hessian, keep, allowed=free)
    assert not (fewer & ~free).any()
    assert fewer.sum(1).tolist() == free.sum(1).clamp(max=count).tolist()


def test_wanda_looks_at_inputs_where_magnitude_does_not() -> None:
    weight = torch.tensor([[1.0, 0.9, 0.8, 0.7]])
    hessian = torch.diag(torch.tensor([0.01, 0.02, 4.0, 9.0]))
    assert wanda_mask("w", weight, hessian, 0.5).tolist() == [[False, False, True, True]]
    assert wanda_mask("w", weight, hessian, 0.25, Pattern(1, 2)).tolist() == [[False, True, False, True]]
    # one dead input has a score of 0 and goes first; of equal ones the first stays
    assert wanda_mask("w", torch.ones(1, 4), torch.diag(torch.tensor([0.0, 1, 1, 1])), 0.5).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4), Pattern(4, 8)])
def test_sparsegpt_beats_wanda_and_wanda_beats_magnitude_in_the_outputs(pattern: Pattern | None) -> None:
    weight, x, hessian = case(48, 256, seed=4)
    factor = factorize(hessian, 0.01, activation_order=False)
    assert factor is not None
    by_magnitude = pattern_mask(weight.abs(), pattern) if pattern else largest(weight.abs(), exact_count(0.5, weight.numel()))
    found = [
        sparsegpt("w", weight, hessian, factor, 0.5, pattern)[0],
        weight * wanda_mask("w", weight, hessian, 0.5, pattern),
        weight * by_magnitude,
    ]
    assert [int((one != 0).sum()) for one in found] == [weight.numel() // 2] * 3
    errors = [float(((weight - one) @ x.T).double().square().mean()) for one in found]
    assert errors[0] < 0.8 * errors[1] and errors[1] < 0.8 * errors[2]


def test_weights_that_cannot_be_compared_are_refused_by_name() -> None:
    weight, _, hessian = case(4, 8)
    weight[1, 2] = torch.inf
    factor = factorize(hessian, 0.01, activation_order=False)
    assert factor is not None
    with pytest.raises(NonFiniteError, match=r"layers\.1\.up holds NaN or infinite"):
        wanda_mask("layers.1.up", weight, hessian, 0.5)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.up holds NaN or infinite"):
        sparsegpt("layers.1.up", weight, hessian, factor, 0.5)
