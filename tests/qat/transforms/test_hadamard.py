"""Hadamard matrices of every order that is offered, and rotations drawn by a seed."""

import pytest
import torch

from decoct.qat.transforms.hadamard import Rotation, matrix
from decoct.qat.transforms.hadamard_orders import Order, nearest_sizes, order_of

ORDERS = [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 48, 52, 56, 60, 64, 68, 72, 76, 80, 84, 88, 100, 576, 896, 960, 1536]


@pytest.mark.parametrize("size", ORDERS)
def test_the_rows_are_orthogonal_signs(size: int) -> None:
    order = order_of(size)
    assert order is not None and order.power * order.base == size
    found = matrix(order)
    assert torch.equal(found.abs(), torch.ones(size, size, dtype=torch.float64))
    assert torch.equal(found @ found.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 12, 24, 52, 576])
def test_a_rotation_is_its_matrix(size: int) -> None:
    rotation, order = Rotation(size, 3, "x"), order_of(size)
    assert order is not None
    x = torch.randn(5, size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = rotation.rotated(torch.eye(size, dtype=torch.float64))
    # a row of the identity is a row of signs times H
    assert torch.allclose(whole, whole.diagonal().sign().diag() * 0 + whole[:, :1].sign() * (whole * whole[:, :1].sign()))
    torch.testing.assert_close((whole * size**0.5).abs(), torch.ones_like(whole))
    torch.testing.assert_close(whole @ whole.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close((whole * size**0.5) * (whole * size**0.5)[:, :1], matrix(order) * matrix(order)[:, :1])
    torch.testing.assert_close(rotation.rotated(x, 1), torch.einsum("bic,ij->bjc", x, whole))


def test_seed_and_word_draw_other_signs() -> None:
    eye = torch.eye(64)
    one, again = Rotation(64, 0, "a").rotated(eye), Rotation(64, 0, "a").rotated(eye)
    assert torch.equal(one, again)
    assert not torch.equal(one, Rotation(64, 1, "a").rotated(eye))
    assert not torch.equal(one, Rotation(64, 0, "b").rotated(eye))


def test_an_outlier_is_spread_over_all_channels() -> None:
    x = torch.zeros(1, 576)
    x[0, 7] = 24.0
    torch.testing.assert_close(Rotation(576, 0, "x").rotated(x).abs(), torch.ones(1, 576))


def test_large_tables_are_rotated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(37, 24, generator=torch.Generator().manual_seed(0))
    whole = Rotation(24, 0, "x").rotated(x)
    monkeypatch.setattr("decoct.qat.transforms.hadamard.ROTATED_AT_ONCE", 100)
    torch.testing.assert_close(Rotation(24, 0, "x").rotated(x), whole)


def test_sizes_without_a_matrix_have_neighbours_with_one() -> None:
    assert [size for size in range(4, 200, 4) if order_of(size) is None] == [92, 116, 156, 172, 184, 188]
    assert order_of(92) is None and nearest_sizes(92) == [88, 96]
    assert order_of(6) is None and nearest_sizes(6) == [4, 8]
    assert order_of(576) == Order(16, 36)
    assert Order(16, 36).words() == "16 x 36" and Order(1, 12).words() == "12" == Order(12, 1).words()
