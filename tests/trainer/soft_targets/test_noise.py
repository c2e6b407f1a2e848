"""Noise of the gradient from sampled rows: never above that of plain importance weights, and far below near the end of training."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decoct.losses.sparse import SparseTargets, sparse_forward_kl
from decoct.trainer.soft_targets.choosing import choose_rows
from decoct.trainer.soft_targets.packed_rows import RowFormat

DRAWS = 400
VOCAB = 300
FORMS = {"hybrid": (8, 24), "sampled": (1, 11), "few": (1, 3)}


def rows(log_p: Tensor, top: int, others: int, seed: int) -> SparseTargets:
    """One position kept ``DRAWS`` times, each time with the vocabulary in another order, as it is at other positions."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(DRAWS, len(log_p), generator=generator).argsort(1)
    form = RowFormat(v_eff=len(log_p), top=top, others=others, tail=False, temperature=1.0)
    chosen = choose_rows(log_p[order], form, torch.rand(DRAWS, generator=generator))
    known = form.decode(form.encode(chosen, torch.rand(DRAWS, top + others, generator=generator)))
    return replace(known, ids=order.gather(1, known.filled()[0]))


def gradients(student: Tensor, known: SparseTargets) -> Tensor:
    leaf = student.expand(DRAWS, -1).clone().requires_grad_()
    return torch.autograd.grad(sparse_forward_kl(leaf, known).sum(), leaf)[0]


def noise(teacher: Tensor, student: Tensor, form: str, seed: int = 0) -> float:
    """Variance of the gradient against that of the same rows that do not tell how they were drawn."""
    known = rows(teacher.log_softmax(0), *FORMS[form], seed)
    ours, plain = (float(gradients(student, one).var(0).sum()) for one in (known, replace(known, log_inclusion=None)))
    return ours / plain


def teacher_of(seed: int, spread: float, sure: float) -> Tensor:
    """Logits of ``spread``; the likeliest token has at least the probability ``sure``."""
    logits = spread * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))
    logits[7] = max(float(logits[7]), float(logits.logsumexp(0)) + math.log(sure / (1 - sure)))
    return logits.log_softmax(0)


def with_tail(teacher: Tensor, tail: Tensor, scale: float, head: int) -> Tensor:
    """The teacher's ``head`` likeliest tokens, and logits ``tail`` for the others, whose mass is ``scale`` times the teacher's."""
    others = teacher.argsort(descending=True)[head:]
    log_q = teacher.clone()
    log_q[others] = tail[others].log_softmax(0) + teacher[others].logsumexp(0) + math.log(scale)
    return log_q.log_softmax(0)


def constructed(kind: str, teacher: Tensor, head: int, generator: torch.Generator) -> Tensor:
    """A student that is right about the head and wrong about the tail."""
    others = teacher.argsort(descending=True)[head:]
    random = torch.randn(VOCAB, generator=generator)
    if kind == "flat":
        return with_tail(teacher, torch.zeros(VOCAB), 1, head)
    if kind == "reversed":
        tail = teacher.clone()
        tail[others] = teacher[others.flip(0)]
        return with_tail(teacher, tail, 1, head)
    if kind == "permuted":
        tail = teacher.clone()
        tail[others] = teacher[others[torch.randperm(len(others), generator=generator)]]
        return with_tail(teacher, tail, 1, head)
    if kind == "heavy":
        return with_tail(teacher, teacher, 5, head)
    if kind == "light":
        return with_tail(teacher, teacher, 0.2, head)
    if kind.startswith("noise"):
        return with_tail(teacher, teacher + float(kind.removeprefix("noise ")) * random, 1, head)
    # all of the tail's doubt about one token that the teacher hardly knows
    tail = teacher.clone()
    tail[others[-20]] = teacher[others].logsumexp(0) + {"giant": -0.8, "huge": 1.0}[kind]
    return with_tail(teacher, tail, 3 if kind == "huge" else 1, head)


KINDS = ["flat", "reversed", "permuted", "heavy", "light", "noise 0.8", "noise 1.5", "noise 3", "giant", "huge"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_tail_never_adds_noise(kind: str, form: str) -> None:
    for spread, sure in ((1.5, 0.1), (4.0, 0.1), (2.0, 0.9), (2.0, 0.999)):
        teacher = teacher_of(1, spread, sure)
        student = constructed(kind, teacher, 40, torch.Generator().manual_seed(2))
        assert noise(teacher, student, form) < 1.1, (spread, sure)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    spread=st.floats(0.5, 6),
    sure=st.floats(0.01, 0.9999),
    gap=st.floats(0.05, 4),
    shrunk=st.floats(0, 1.5),
    kind=st.sampled_from(["everywhere", *KINDS]),
    head=st.integers(1, 60),
    form=st.sampled_from(sorted(FORMS)),
)
def test_no_student_adds_noise(seed: int, spread: float, sure: float, gap: float, shrunk: float, kind: str, head: int, form: str) -> None:
    teacher, generator = teacher_of(seed, spread, sure), torch.Generator().manual_seed(seed + 1)
    student = teacher if kind == "everywhere" else constructed(kind, teacher, head, generator)
    student = shrunk * student + gap * torch.randn(VOCAB, generator=generator)
    assert noise(teacher, student, form, seed) < 1.2


@pytest.mark.parametrize("form", ["hybrid", "sampled"])
@pytest.mark.parametrize("sure", [0.1, 0.9, 0.99, 0.999])
@pytest.mark.parametrize(("gap", "most"), [(0.1, 0.1), (0.3, 0.45)])
def test_near_the_end_of_training_most_noise_is_gone(gap: float, most: float, sure: float, form: str) -> None:
    """Ten times less at a distance of 0.1 a logit, more than twice less at 0.3: at positions that are all but certain as well."""
    for seed in range(3):
        teacher = teacher_of(seed, 2.0, sure)
        student = teacher + gap * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed + 9))
        assert noise(teacher, student, form, seed) < most


@pytest.mark.parametrize("form", ["hybrid", "sampled"])
@pytest.mark.parametrize("gap", [0.1, 0.3, 0.6])
def test_the_mean_of_the_gradient_is_the_divergences(gap: float, form: str) -> None:
    """To a twentieth of it, beside five standard errors; the value exactly."""
    teacher = teacher_of(4, 2.0, 0.1)
    student = teacher + gap * torch.randn(VOCAB, generator=torch.Generator().manual_seed(5))
    exact = student.softmax(0) - teacher.exp()
    seen = torch.cat([gradients(student, rows(teacher, *FORMS[form], seed)) for seed in range(20)])
    assert (seen.mean(0) - exact).norm() < 0.05 * exact.norm() + 5 * (seen.var(0).sum() / len(seen)).sqrt() / 2
    values = torch.cat([sparse_forward_kl(student.expand(DRAWS, -1), rows(teacher, *FORMS[form], seed)) for seed in range(20)])
    full = float((teacher.exp() * (teacher - student.log_softmax(0))).sum())
    assert abs(float(values.mean()) - full) < 5 * float(values.std()) / len(values) ** 0.5 + 1e-3


def test_a_token_that_the_teacher_hardly_knows_is_still_pushed_down() -> None:
    """What the cut takes from the gradient never turns it round."""
    teacher = teacher_of(3, 2.0, 0.1)
    student = constructed("giant", teacher, 40, torch.Generator())
    token = int((student - teacher).argmax())
    assert student[token] - teacher[token] > 3
    seen = torch.cat([gradients(student, rows(teacher, *FORMS["hybrid"], seed)) for seed in range(5)])[:, token]
    assert float(seen.mean()) > 3 * float(seen.std()) / len(seen) ** 0.5
