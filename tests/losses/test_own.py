"""Divergences that the user wrote: the same sums and gradients as a built-in one of the same formula, in blocks and whole."""

from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.losses.choice import chosen_divergence
from decoct.losses.linear_divergence import TeacherHidden, linear_divergence
from decoct.losses.linear_divergence.chunked import chunked_sums
from decoct.losses.linear_divergence.fused import can_fuse
from decoct.losses.linear_divergence.inputs import HiddenStates, checked_problem
from decoct.losses.settings import LossSettings
from decoct.losses.settings_own import OwnLossSettings
from decoct.parts import PartError

from ..support.own_parts import parts_of_text

FILE = """
@parts.divergence("my_kl")
def my_kl(student, teacher, *, alpha: Annotated[float, Bounds(gt=0)] = 1.0):
    return alpha * (teacher.exp() * (teacher - student)).sum(-1)

@parts.divergence("mean")
def mean(student, teacher):
    return (student - teacher).mean()

@parts.divergence("number")
def number(student, teacher):
    return 1.0

@parts.divergence("constant")
def constant(student, teacher):
    return teacher.exp().sum(-1)

@parts.divergence("peeking")
def peeking(student, teacher):
    assert not teacher.requires_grad
    peeking.rows.append(tuple(student.shape))
    return (student.exp() - teacher.exp()).square().sum(-1)

peeking.rows = []
"""
V = 61


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    """settings(name, **keys)."""
    found = parts_of_text(tmp_path, FILE)

    def make(name: str, **keys: Any) -> OwnLossSettings:
        made = found.settings("divergence", name)
        assert made is not None
        return made(**keys)

    return make


def tensors(rows: int = 13, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(V, (rows,), generator=generator)
    labels[::4] = -100
    head, teacher_head = draw(64, 8), draw(72, 12)
    # padding rows must never be read
    head[V:], teacher_head[V:] = torch.nan, torch.nan
    hidden, bias = draw(rows, 8), draw(64)
    return {
        "student_hidden": hidden.requires_grad_(),
        "student_head": head.requires_grad_(),
        "student_bias": bias.requires_grad_(),
        "teacher": TeacherHidden(draw(rows, 12), teacher_head),
        "labels": labels,
        "v_eff": V,
    }


def gradients(loss: torch.Tensor, given: dict[str, Any]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [given["student_hidden"], given["student_head"], given["student_bias"]]))


@pytest.mark.parametrize("hard_weight", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_the_same_formula_gives_the_sums_and_gradients_of_the_built_in_one(
    backend: Any, temperature: float, hard_weight: float, settings: Any
) -> None:
    given = tensors()
    keys: dict[str, Any] = {"temperature": temperature, "hard_weight": hard_weight}
    own = linear_divergence(**given, settings=settings("my_kl", **keys), backend=backend)
    theirs = linear_divergence(**given, settings=LossSettings(**keys), backend="reference")
    for name in ("loss", "kl", "cross_entropy", "teacher_entropy", "top1_matches", "tokens"):
        torch.testing.assert_close(getattr(own, name), getattr(theirs, name), rtol=1e-9, atol=1e-12)
    # of a loss that is not the last node of the graph
    for mine, expected in zip(gradients(3 * own.loss, given), gradients(3 * theirs.loss, given)):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


def test_options_reach_the_function_and_scale_the_loss(settings: Any) -> None:
    given = tensors()
    once, twice = (linear_divergence(**given, settings=settings("my_kl", alpha=alpha), backend="chunked").loss for alpha in (1.0, 2.0))
    torch.testing.assert_close(twice, 2 * once)


def test_gradients_are_those_of_finite_differences(settings: Any) -> None:
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda x: chosen_divergence(x, teacher, settings("peeking")), student.requires_grad_())


def test_logits_are_handed_over_in_blocks_whose_size_does_not_change_the_result(settings: Any) -> None:
    given, chosen = tensors(), settings("peeking")
    student = HiddenStates(given["student_hidden"], given["student_head"], given["student_bias"])
    problem = checked_problem(student, given["teacher"], given["labels"], chosen, V)
    seen = chosen.part.target.rows
    seen.clear()
    whole, parts = chunked_sums(problem), chunked_sums(problem, rows=2)
    assert seen == [(9, V), *[(2, V)] * 4, (1, V)], "13 rows, of which 4 are masked"
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-12, atol=0)
    for mine, expected in zip(gradients(parts.loss, given), gradients(whole.loss, given)):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)


def test_nothing_is_differentiated_without_gradients(settings: Any) -> None:
    given = tensors()
    with torch.no_grad():
        sums = linear_divergence(**given, settings=settings("constant"), backend="chunked")
    assert not sums.loss.requires_grad
    torch.testing.assert_close(sums.loss, torch.tensor(9.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mean", r"my_parts.py:9: divergence 'mean' must return one number per token, a floating tensor of shape \[9\] here; it returned"),
        ("number", r"my_parts.py:13: divergence 'number' must return .*; it returned float"),
        ("constant", r"my_parts.py:17: divergence 'constant' returned a value that does not depend on the student's log-probabilities"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_what_is_no_divergence_is_refused_with_its_place(backend: Any, name: str, message: str, settings: Any) -> None:
    with pytest.raises(PartError, match=message):
        linear_divergence(**tensors(), settings=settings(name), backend=backend)


def test_the_triton_back_end_leaves_it_to_the_chunked_one(settings: Any) -> None:
    given = tensors(dtype=torch.float32)
    student = HiddenStates(given["student_hidden"], given["student_head"], given["student_bias"])
    assert not can_fuse(checked_problem(student, given["teacher"], given["labels"], settings("my_kl"), V))
    with pytest.raises(ValueError, match="backend='triton' has no kernel for the imported divergence 'my_kl'; use backend='auto'"):
        linear_divergence(**given, settings=settings("my_kl"), backend="triton")


def test_a_token_of_probability_zero_is_a_finite_logarithm(settings: Any) -> None:
    student, teacher = torch.zeros(2, 4), torch.zeros(2, 4)
    student[:, 0] = teacher[:, 0] = -torch.inf
    assert chosen_divergence(student, teacher, settings("my_kl")).tolist() == [0.0, 0.0]


def test_an_option_may_have_the_name_of_a_dial_and_other_dials_stay_refused(settings: Any) -> None:
    assert settings("my_kl").alpha == 1.0
    assert settings("mean").alpha is None
    with pytest.raises(ValueError, match=r"alpha=-1 must be greater than 0"):
        settings("my_kl", alpha=-1)
    with pytest.raises(ValueError, match=r"beta=0\.5 has no effect: it belongs to jsd and gkd_jsd, and divergence is my_kl; leave it out"):
        settings("my_kl", beta=0.5)
    with pytest.raises(ValueError, match=r"alpha=0\.5 has no effect"):
        settings("mean", alpha=0.5)
