"""Attention relations against their definition in Python floats, values and gradients; which tokens see each other."""

import math

import pytest
import torch
from torch import Tensor

from decoct.losses.relations import relation_divergence, visible_tokens


def _distribution(vectors: list[list[float]], row: int, part: slice, seen: list[bool]) -> dict[int, float]:
    size = part.stop - part.start
    scores = {
        other: math.fsum(a * b for a, b in zip(vectors[row][part], vectors[other][part])) / math.sqrt(size)
        for other in range(len(vectors))
        if seen[other]
    }
    top = max(scores.values())
    total = math.fsum(math.exp(score - top) for score in scores.values())
    return {other: math.exp(score - top) / total for other, score in scores.items()}


def _oracle(student: list[list[float]], teacher: list[list[float]], visible: list[list[bool]], heads: int) -> list[float]:
    found = []
    for row, seen in enumerate(visible):
        total = []
        for head in range(heads):
            parts = [slice(head * len(v[0]) // heads, (head + 1) * len(v[0]) // heads) for v in (student, teacher)]
            q, p = _distribution(student, row, parts[0], seen), _distribution(teacher, row, parts[1], seen)
            total.append(math.fsum(p[other] * math.log(p[other] / q[other]) for other in p))
        found.append(math.fsum(total) / heads)
    return found


def _numbers(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_value_and_gradient_are_those_of_the_definition() -> None:
    student, teacher = _numbers(7, 12, 1).requires_grad_(), _numbers(7, 18, 2)
    visible = visible_tokens(torch.tensor([0, 1, 2, 0, 0, 1, 2]), None, 7)
    value = relation_divergence(student, teacher, visible, heads=3)
    mask = visible.tolist()
    assert value.tolist() == pytest.approx(_oracle(student.tolist(), teacher.tolist(), mask, 3), rel=1e-10, abs=1e-14)
    factors = [1.0, 2.0, -1.0, 5.0, 3.0, 0.5, 2.5]
    (gradient,) = torch.autograd.grad((value * torch.tensor(factors, dtype=torch.float64)).sum(), student)
    step = 1e-6
    for place in [(0, 0), (1, 5), (2, 11), (5, 3), (6, 8)]:
        ends = []
        for sign in (1, -1):
            moved = student.detach().clone()
            moved[place] += sign * step
            ends.append(math.fsum(f * v for f, v in zip(factors, _oracle(moved.tolist(), teacher.tolist(), mask, 3))))
        assert float(gradient[place]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-9)


def test_a_packed_document_has_the_relations_that_it_has_alone() -> None:
    student, teacher = _numbers(9, 8, 3), _numbers(9, 8, 4)
    together = relation_divergence(student, teacher, visible_tokens(torch.tensor([0, 1, 2, 3, 0, 1, 0, 1, 2]), None, 9), 2)
    alone = [
        relation_divergence(own, theirs, visible_tokens(None, None, len(own)), 2)
        for own, theirs in zip(student.split([4, 2, 3]), teacher.split([4, 2, 3]))
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-15)


def test_padding_is_not_seen_and_sharp_relations_stay_finite() -> None:
    student, teacher = 40 * _numbers(6, 8, 5).float(), 40 * _numbers(6, 8, 6).float()
    mask = torch.tensor([1, 1, 1, 1, 0, 0])
    own = student.clone().requires_grad_()
    value = relation_divergence(own, teacher, visible_tokens(None, mask, 6), 4)
    value.sum().backward()
    assert value.isfinite().all() and own.grad is not None and own.grad.isfinite().all()
    torch.testing.assert_close(value[:4], relation_divergence(student[:4], teacher[:4], visible_tokens(None, None, 4), 4))
    assert value[4:].abs().max() == 0, "a padded token sees itself alone"
    assert (own.grad[4:] == 0).all()


def test_padding_before_the_text_is_not_seen_either() -> None:
    seen = visible_tokens(None, torch.tensor([0, 1, 1]), 3)
    assert seen.tolist() == [[True, False, False], [False, True, False], [False, True, True]]


def test_heads_that_do_not_divide_a_width_are_refused() -> None:
    with pytest.raises(ValueError, match="3 relation heads do not divide vectors of 8 numbers"):
        relation_divergence(_numbers(2, 8, 1), _numbers(2, 8, 1), visible_tokens(None, None, 2), 3)
    with pytest.raises(ValueError, match="vectors"):
        relation_divergence(_numbers(2, 8, 1), _numbers(3, 8, 1), visible_tokens(None, None, 2), 2)
