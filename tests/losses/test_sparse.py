"""Sparse teachers against the definitions in fp64, in value and gradient, through every way to the loss."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from decoct.losses.divergences import forward_kl, teacher_entropy
from decoct.losses.linear_divergence import linear_divergence
from decoct.losses.settings import LossSettings
from decoct.losses.sparse import SparseTargets, sparse_forward_kl

VOCAB, ROWS, WIDTH = 41, 7, 9
FIGURES = ("loss", "kl", "cross_entropy", "teacher_entropy", "top1_matches", "tokens")


def pair(seed: int = 0, gap: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """(student hidden states, student head, teacher logits): sharp, nearly equal logits in fp64."""
    generator = torch.Generator().manual_seed(seed)
    hidden, head = (torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in (ROWS, VOCAB))
    head = head * 8 / WIDTH**0.5
    return hidden, head, hidden @ head.T + gap * torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64)


def top(teacher: Tensor, kept: int, *, temperature: float = 1.0, unused: int = 0) -> SparseTargets:
    """The ``kept`` likeliest tokens and the tail, and ``unused`` slots that name a likely token all the same."""
    log_p = (teacher / temperature).log_softmax(-1)
    order = log_p.argsort(-1, descending=True)
    ids, rest = order[:, :kept], order[:, kept:]
    tail = log_p.gather(1, rest).logsumexp(1) if rest.shape[1] else torch.full((len(teacher),), -torch.inf, dtype=torch.float64)
    weights = torch.cat([log_p.gather(1, ids), torch.full((len(ids), unused), -torch.inf, dtype=torch.float64)], 1)
    # the slots that are not in use lie in front, and name the token after the last
    ids = torch.cat([ids, order[:, [min(kept, VOCAB - 1)] * unused]], 1)
    return SparseTargets(ids.flip(1), weights.flip(1), teacher_entropy(teacher, temperature=temperature), order[:, 0], tail, temperature)


def oracle(student: Tensor, teacher: Tensor, kept: int, temperature: float) -> Tensor:
    """The bucket form token by token, in probabilities: [rows]."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    values = []
    for row in range(len(p)):
        order = sorted(range(VOCAB), key=lambda v, row=row: -p[row, v].item())
        value = sum((p[row, v] * (p[row, v] / q[row, v]).log() for v in order[:kept]), torch.zeros((), dtype=torch.float64))
        if kept < VOCAB:
            p_tail, q_tail = (sum(x[row, v] for v in order[kept:]) for x in (p, q))
            value = value + p_tail * torch.log(p_tail / q_tail)  # pyright: ignore[reportArgumentType, reportOperatorIssue]
        values.append(value)
    return torch.stack(values)


@pytest.mark.parametrize("unused", [0, 2])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kept", [1, 5, VOCAB - 1, VOCAB])
def test_bucket_form_is_the_kl_of_the_buckets(kept: int, temperature: float, unused: int) -> None:
    hidden, head, teacher = pair(gap=0.5)
    student = (hidden @ head.T).requires_grad_()
    expected = oracle(student, teacher, kept, temperature)
    value = sparse_forward_kl(student, top(teacher, kept, temperature=temperature, unused=unused))
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    (wanted,) = torch.autograd.grad(expected.sum(), student)
    (got,) = torch.autograd.grad(value.sum(), student)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-12)
    full = forward_kl(student, teacher, temperature=temperature)
    assert (value <= full + 1e-12).all()
    if kept >= VOCAB - 1:
        torch.testing.assert_close(value, full, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("hard", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("form", ["bucket", "whole", "sampled", "controlled"])
def test_both_back_ends_give_the_dense_form(form: str, temperature: float, hard: float, dtype: torch.dtype) -> None:
    hidden, head, teacher = pair()
    labels = torch.randint(0, VOCAB, (ROWS,), generator=torch.Generator().manual_seed(1))
    labels[[1, 4]] = -100
    targets = top(teacher, VOCAB if form == "whole" else 5, temperature=temperature, unused=1)
    if form in ("sampled", "controlled"):
        targets = replace(targets, log_tail=None)
    if form == "controlled":
        # the two likeliest for certain; slots that are not in use say something all the same
        targets = replace(targets, log_inclusion=torch.tensor([-0.5, -3.0, -1.0, -0.25, 0.0, 0.0], dtype=torch.float64).expand(ROWS, -1))
    kept = labels != -100
    given: dict[str, Any] = {} if hard == 1 else {"temperature": temperature}
    settings = LossSettings(hard_weight=hard, **given)
    exact = [part.clone().requires_grad_() for part in (hidden, head)]
    logits = (exact[0] @ exact[1].T)[kept]
    soft = sparse_forward_kl(logits, targets[kept])
    cross = -logits.log_softmax(-1)[torch.arange(int(kept.sum())), labels[kept]]
    loss = (cross if hard == 1 else settings.scale * soft + hard * cross).sum()
    expected = torch.autograd.grad(loss, exact)
    padded = torch.cat([head, torch.full((3, WIDTH), torch.nan, dtype=torch.float64)])
    hidden = torch.where(kept[:, None], hidden, torch.nan)
    tolerance: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 2e-4}
    for backend in ("reference", "chunked", "auto"):
        leaves = [part.to(dtype).requires_grad_() for part in (hidden, padded)]
        sums = linear_divergence(leaves[0], leaves[1], targets, labels, settings, v_eff=VOCAB, backend=backend)  # pyright: ignore[reportArgumentType]
        wanted = (loss, soft.sum(), cross.sum(), targets.entropy[kept].sum())
        for name, value in zip(FIGURES, wanted):
            torch.testing.assert_close(getattr(sums, name).double(), value, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
        assert int(sums.top1_matches) == int((logits.argmax(-1) == targets.best[kept]).sum())
        got = torch.autograd.grad(sums.loss, leaves)
        torch.testing.assert_close(got[0][kept].double(), expected[0][kept], **tolerance)
        torch.testing.assert_close(got[1][:VOCAB].double(), expected[1], **tolerance)
        assert got[0][~kept].abs().sum() == 0
        assert got[1][VOCAB:].abs().sum() == 0


def test_sampled_form_is_unbiased_in_value_and_gradient() -> None:
    """200,000 draws of 8 tokens: the mean estimate is the KL, and its gradient the KL's, within five standard errors."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(1, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    draws, size = 200_000, 8
    p = teacher.softmax(-1)
    drawn = torch.multinomial(p.expand(draws, -1), size, replacement=True, generator=generator)
    weights = torch.zeros(draws, 12, dtype=torch.float64).scatter_add_(1, drawn, torch.full(drawn.shape, 1 / size, dtype=torch.float64))
    ids = torch.arange(12).expand(draws, -1)
    entropy, best = teacher_entropy(teacher).expand(draws), teacher.argmax(-1).expand(draws)
    leaf = student.expand(draws, -1).clone().requires_grad_()
    values = sparse_forward_kl(leaf, SparseTargets(ids, weights.log(), entropy, best))
    (gradients,) = torch.autograd.grad(values.sum(), leaf)
    for seen, truth in ((values[:, None], forward_kl(student, teacher)[:, None]), (gradients, student.softmax(-1) - p)):
        error = (seen.mean(0) - truth[0]).abs()
        assert (error <= 5 * seen.std(0) / draws**0.5 + 1e-12).all()


def draw(p: Tensor, certain: int, size: int, draws: int, *, controlled: bool) -> SparseTargets:
    """``draws`` samples of p [V]: the ``certain`` likeliest tokens, and ``size`` others with probabilities like p, in random order."""
    generator = torch.Generator().manual_seed(5)
    inclusion = torch.ones_like(p)
    others = p.argsort(descending=True)[certain:]
    inclusion[others] = size * p[others] / p[others].sum()
    assert float(inclusion.max()) <= 1
    order = torch.rand(draws, len(others), generator=generator).argsort(1)
    through = inclusion[others][order].cumsum(1) + torch.rand(draws, 1, generator=generator, dtype=torch.float64)
    hit = through.floor().diff(dim=1, prepend=torch.zeros(draws, 1, dtype=torch.float64)) > 0
    taken = torch.ones(draws, len(p), dtype=torch.bool)
    taken[:, others] = torch.zeros_like(hit).scatter_(1, order, hit)
    weights = torch.where(taken, p / inclusion, 0.0)
    entropy = torch.special.entr(p).sum().expand(draws)
    told = inclusion.log().expand(draws, -1) if controlled else None
    return SparseTargets(
        torch.arange(len(p)).expand(draws, -1), weights.log(), entropy, p.argmax().expand(draws), log_inclusion=told
    )  # fmt: skip


@pytest.mark.parametrize("gap", [0.2, 0.5, 3.0])
@pytest.mark.parametrize("certain", [0, 1, 3])
def test_controlled_form_is_unbiased_in_value_and_nearly_so_in_gradient(certain: int, gap: float) -> None:
    """The value within five standard errors. Few tokens exclude each other much, so the gradient to a twentieth of what it is."""
    generator = torch.Generator().manual_seed(1)
    teacher = 0.4 * torch.randn(24, generator=generator, dtype=torch.float64)
    student = teacher + gap * torch.randn(24, generator=generator, dtype=torch.float64)
    draws, p = 100_000, teacher.softmax(0)
    leaf = student.expand(draws, -1).clone().requires_grad_()
    values = sparse_forward_kl(leaf, draw(p, certain, 6, draws, controlled=True))
    (gradients,) = torch.autograd.grad(values.sum(), leaf)
    values = values.detach()
    exact = student.softmax(0) - p
    assert abs(float(values.mean() - forward_kl(student, teacher))) <= 5 * float(values.std()) / draws**0.5 + 1e-12
    assert (gradients.mean(0) - exact).norm() <= 0.05 * exact.norm() + 5 * (gradients.var(0).sum() / draws).sqrt()
    assert gradients.sum(1).abs().max() < 1e-12


def test_controlled_form_is_its_formula() -> None:
    """Value and gradient of one draw against the definition in probabilities, c and the cut among it, token by token in fp64."""
    generator = torch.Generator().manual_seed(2)
    p = torch.randn(9, generator=generator, dtype=torch.float64).mul(0.5).softmax(0)
    q = (p * (1 + 0.2 * torch.randn(9, generator=generator, dtype=torch.float64))).tolist()
    p = p.tolist()
    p[5], q[5] = p[5] / 3, 2 * q[5]
    p, q = ([x / sum(row) for x in row] for row in (p, q))
    taken, drawn = [0, 2, 3, 5, 7], [2, 5, 7]
    rest, left = 1 - p[0] - p[3], 1 - q[0] - q[3]
    r = {v: 3 * p[v] / rest if v in drawn else 1.0 for v in taken}
    apart = {v: math.log(q[v] * rest / (p[v] * left)) ** 2 for v in drawn}
    most = min(1.0, rest / left)
    c = most * math.exp(-sum(apart.values()) / 3)
    own = {v: most * math.exp(-sum(apart[u] for u in drawn if u != v) / 2) for v in drawn}
    x = {v: c * q[v] for v in (0, 3)} | {v: own[v] * q[v] / r[v] - (own[v] - c) * q[v] for v in drawn}
    assert x[5] > 4 * p[5] / r[5]
    x[5] = 4 * p[5] / r[5]
    assert all(0.01 * p[v] / r[v] < x[v] < 3 * p[v] / r[v] for v in (2, 7))
    p, q = torch.tensor(p, dtype=torch.float64), torch.tensor(q, dtype=torch.float64)
    logits = q.log().clone().requires_grad_()
    log_own = logits.log_softmax(0)
    entropy = -(p * p.log()).sum()
    wanted = -sum(p[v] / r[v] * log_own[v] for v in taken) - entropy
    left_over = torch.stack([p[v] / r[v] - x[v] for v in taken])
    (slope,) = torch.autograd.grad(-(left_over * log_own[taken]).sum(), logits)
    ids, weights = torch.tensor([taken]), torch.tensor([[float(p[v]) / r[v] for v in taken]], dtype=torch.float64)
    inclusion = torch.tensor([[r[v] for v in taken]], dtype=torch.float64).log()
    targets = SparseTargets(ids, weights.log(), entropy[None], p.argmax()[None], log_inclusion=inclusion)
    leaf = q.log()[None].clone().requires_grad_()
    value = sparse_forward_kl(leaf, targets)
    torch.testing.assert_close(value[0], wanted, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), leaf)[0][0], slope, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("gap", "most"), [(0.0, 1e-9), (0.1, 0.02), (0.5, 0.3), (4.0, 1.01)])
def test_knowing_how_tokens_were_drawn_takes_the_noise_out_as_the_student_comes_near(gap: float, most: float) -> None:
    """Variance of the gradient, against that of the same draws without it: nothing at no distance, never more far away."""
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(200, generator=generator, dtype=torch.float64)
    student = teacher + gap * torch.randn(200, generator=generator, dtype=torch.float64)
    noise = []
    for controlled in (True, False):
        leaf = student.expand(4000, -1).clone().requires_grad_()
        value = sparse_forward_kl(leaf, draw(teacher.softmax(0), 8, 12, 4000, controlled=controlled)).sum()
        noise.append(float(torch.autograd.grad(value, leaf)[0].var(0).sum()))
    assert noise[0] <= most * noise[1]


def test_a_tail_below_all_precision_gives_no_noise() -> None:
    """The support holds all but 1e-13: 1 - sum would be rounding noise; a tail of nothing at all is no NaN."""
    teacher = torch.full((1, 50), -30.0)
    teacher[0, 3] = 0.0
    student = (teacher + torch.linspace(-0.1, 0.1, 50)).requires_grad_()
    log_p = teacher.double().log_softmax(-1)
    tail = torch.cat([log_p[:, :3], log_p[:, 4:]], 1).logsumexp(1)
    exact = SparseTargets(torch.tensor([[3]]), log_p[:, [3]], teacher_entropy(teacher.double()), torch.tensor([3]), tail)
    single = SparseTargets(exact.ids, exact.log_weights.float(), exact.entropy.float(), exact.best, tail.float())
    value = sparse_forward_kl(student, single)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.abs().item() < 1e-6
    assert gradient.abs().max() < 1e-6
    nothing = SparseTargets(exact.ids, torch.zeros(1, 1), exact.entropy.float(), exact.best, torch.full((1,), -torch.inf))
    (gradient,) = torch.autograd.grad(sparse_forward_kl(student, nothing).sum(), student)
    assert gradient.isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    hidden, head, teacher = pair()
    labels, targets = torch.zeros(ROWS, dtype=torch.int64), top(teacher, 5)

    def refused(match: str, given: SparseTargets, settings: LossSettings, backend: Any = "auto") -> None:
        with pytest.raises(ValueError, match=match):
            linear_divergence(hidden, head, given, labels, settings, v_eff=VOCAB, backend=backend)

    refused(
        "reverse_kl needs the whole distribution of the teacher; with sparse targets use forward_kl",
        targets,
        LossSettings(divergence="reverse_kl"),
    )
    refused(r"temperature=2\.0 differs from that of the sparse targets; set temperature to 1\.0", targets, LossSettings(temperature=2.0))
    refused("covers 3 positions and the student 7", targets[:3], LossSettings())
    refused("backend='triton' does not take sparse targets", targets, LossSettings(), "triton")
    wrong = SparseTargets(targets.ids + 30, targets.log_weights, targets.entropy, targets.best, targets.log_tail)
    refused(r"sparse targets have token ids \d+ to \d+, but the vocabulary has 0 to 40", wrong, LossSettings())
    wrong = SparseTargets(targets.ids, targets.log_weights, targets.entropy[:2], targets.best, targets.log_tail)
    refused(r"entropy of sparse targets must have shape \[7\]", wrong, LossSettings())
    wrong = replace(targets, log_inclusion=torch.zeros_like(targets.log_weights))
    refused("log_inclusion of sparse targets belongs to the sampled form", wrong, LossSettings())
    wrong = SparseTargets(targets.ids.int(), targets.log_weights, targets.entropy, targets.best)
    refused(r"ids \[N, K\] int64", wrong, LossSettings())
