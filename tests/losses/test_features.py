"""Losses on hidden states against their definitions in Python floats, values and gradients."""

import math

import pytest
import torch
from torch import Tensor

from decoct.losses.features import hidden_loss
from decoct.losses.settings import LossSettings
from decoct.losses.settings_features import FeatureSettings, HiddenLoss, HiddenSettings, RelationSettings


def _oracle(student: list[list[float]], teacher: list[list[float]], kind: str, projector: list[list[float]] | None) -> list[float]:
    found = []
    for own, theirs in zip(student, teacher):
        state = own if projector is None else [math.fsum(w * x for w, x in zip(row, own)) for row in projector]
        square = math.fsum((a - b) ** 2 for a, b in zip(state, theirs))
        length = math.sqrt(math.fsum(b * b for b in theirs))
        if kind == "mse":
            found.append(square / len(theirs))
        elif kind == "nmse":
            found.append(square / length**2)
        else:
            product = math.fsum(a * b for a, b in zip(state, theirs))
            found.append(1 - product / (math.sqrt(math.fsum(a * a for a in state)) * length))
    return found


def _numbers(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@pytest.mark.parametrize("kind", ["mse", "nmse", "cosine"])
@pytest.mark.parametrize("projected", [False, True])
def test_value_and_gradients_are_those_of_the_definition(kind: HiddenLoss, projected: bool) -> None:
    student, teacher = _numbers(5, 7, 1).requires_grad_(), _numbers(5, 9 if projected else 7, 2)
    projector = _numbers(9, 7, 3).requires_grad_() if projected else None
    rows = None if projector is None else projector.tolist()
    value = hidden_loss(student, teacher, kind, projector)
    assert value.tolist() == pytest.approx(_oracle(student.tolist(), teacher.tolist(), kind, rows), rel=1e-12)
    # in the middle of a graph: each token's term has a factor of its own
    factors = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.25], dtype=torch.float64)
    leaves = [student] if projector is None else [student, projector]
    gradients = torch.autograd.grad((value * factors).sum(), leaves)
    step = 1e-6
    for leaf, gradient in zip(leaves, gradients):
        for place in [(0, 0), (2, 3), (4, 6)]:
            ends = []
            for sign in (1, -1):
                moved = leaf.detach().clone()
                moved[place] += sign * step
                parts = (moved, projector) if leaf is student else (student, moved)
                given = None if parts[1] is None else parts[1].tolist()
                oracle = _oracle(parts[0].tolist(), teacher.tolist(), kind, given)
                ends.append(math.fsum(f * v for f, v in zip(factors.tolist(), oracle)))
            assert float(gradient[place]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("kind", ["mse", "nmse", "cosine"])
def test_equal_states_have_no_distance_and_states_of_zeros_no_nan(kind: HiddenLoss) -> None:
    states = _numbers(3, 8, 4).float()
    assert hidden_loss(states, states, kind).abs().max() < 1e-6
    zeros = torch.zeros(2, 8, requires_grad=True)
    value = hidden_loss(zeros, torch.stack([torch.ones(8), torch.zeros(8)]), kind)
    value.sum().backward()
    assert value.isfinite().all() and zeros.grad is not None and zeros.grad.isfinite().all()


def test_bf16_states_are_compared_in_fp32_under_autocast_too() -> None:
    student, teacher = _numbers(4, 64, 5).to(torch.bfloat16), _numbers(4, 64, 6).to(torch.bfloat16)
    projector = _numbers(64, 64, 7).float()
    expected = hidden_loss(student.double(), teacher.double(), "mse", projector.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = hidden_loss(student, teacher, "mse", projector)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_no_gradient_reaches_the_teacher_and_other_widths_are_refused() -> None:
    teacher = torch.randn(2, 4, requires_grad=True)
    assert not hidden_loss(torch.randn(2, 4), teacher, "mse").requires_grad
    with pytest.raises(ValueError, match=r"give a projector of shape \[5, 4\]"):
        hidden_loss(torch.randn(2, 4), torch.randn(2, 5), "mse")


def test_settings_refuse_what_has_no_effect_or_no_meaning() -> None:
    def refused(make: object, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()  # pyright: ignore[reportCallIssue]

    refused(lambda: FeatureSettings(), "features need 'hidden' or 'relations'")
    refused(lambda: HiddenSettings(weight=0.0), "weight=0.0 must be greater than 0; leave the section out")
    refused(lambda: HiddenSettings(weight=1.0, layers=((0, 1), (0, 2))), "gives layer 0 of the student two layers")
    refused(lambda: HiddenSettings(weight=1.0, layers=()), r"layers=\[\] names no pair")
    refused(lambda: HiddenSettings(weight=1.0, layers=((0, -1),)), "negative number; layers are counted from 0")
    refused(lambda: HiddenSettings(weight=1.0, layers="first"), "layers='first' is not one of even, kept, last")  # pyright: ignore[reportArgumentType]
    refused(lambda: RelationSettings(weight=1.0, of=("qq", "qq")), "names qq twice")
    refused(lambda: RelationSettings(weight=1.0, of=()), "names no relation")
    hidden = FeatureSettings(hidden=HiddenSettings(weight=1.0))
    refused(lambda: LossSettings(hard_weight=1.0, features=hidden), "features=... need a teacher, and hard_weight 1")
