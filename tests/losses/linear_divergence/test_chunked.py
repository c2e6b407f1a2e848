"""What only the chunked back end promises: blocks, memory, work that is not done."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from decoct.losses.linear_divergence import TeacherHidden, chunked, linear_divergence
from decoct.losses.linear_divergence.chunked import BlockLimits, chunked_sums, rows_per_block
from decoct.losses.linear_divergence.inputs import HiddenStates, checked_problem
from decoct.losses.linear_divergence.reference import reference_sums
from decoct.losses.settings import DIVERGENCES, LossSettings

FIGURES = ("loss", "kl", "cross_entropy", "teacher_entropy", "top1_matches", "tokens")


class Watch(TorchDispatchMode):
    """Shapes of every result and of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.untyped_storage().nbytes() // result.element_size())
        if func in (torch.ops.aten.mm.out, torch.ops.aten.mm.default, torch.ops.aten.addmm.out, torch.ops.aten.addmm_.default):
            left, right = args[-2:]
            self.products.append((left.shape[0], left.shape[1], right.shape[1]))
        return result


@contextmanager
def watching() -> Iterator[Watch]:
    with Watch() as watch:
        yield watch


def problem_of(case: Any, settings: LossSettings) -> Any:
    teacher = TeacherHidden(case.teacher_hidden, case.teacher_head, case.teacher_bias, case.teacher_transform)
    return checked_problem(HiddenStates(case.hidden, case.head, case.bias, case.transform), teacher, case.labels, settings, case.v_eff)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_any_block_size_gives_the_same(case, rows: int, masked: bool) -> None:
    own = case(13, bias=True, capped=True, masked=masked)
    leaves = own.leaves()
    problem = problem_of(own, LossSettings(divergence="jsd", temperature=2.0, hard_weight=0.25))
    sums, expected = chunked_sums(problem, rows=rows), reference_sums(problem)
    for name in FIGURES:
        torch.testing.assert_close(
            getattr(sums, name), getattr(expected, name), rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )
    for got, wanted in zip(torch.autograd.grad(sums.loss, leaves), torch.autograd.grad(expected.loss, leaves)):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


@budget(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 9),
    block=st.integers(1, 5),
    vocab=st.integers(1, 9),
    padding=st.integers(0, 3),
    width=st.integers(1, 5),
    hard=st.sampled_from([0.0, 0.5, 1.0]),
    divergence=st.sampled_from(DIVERGENCES),
    seed=st.integers(0, 99),
)
def test_equals_the_reference_on_odd_sizes(rows, block, vocab, padding, width, hard, divergence, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(vocab + padding, width, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher_hidden, teacher_head = (torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (rows, vocab))
    teacher = TeacherHidden(teacher_hidden, teacher_head)
    labels = torch.randint(-1, vocab, (rows,), generator=generator)
    labels[labels < 0] = -100
    problem = checked_problem(HiddenStates(hidden, head), teacher, labels, LossSettings(divergence=divergence, hard_weight=hard), vocab)
    sums, expected = chunked_sums(problem, rows=block), reference_sums(problem)
    for name in FIGURES:
        torch.testing.assert_close(getattr(sums, name), getattr(expected, name), rtol=1e-9, atol=1e-10)
    for got, wanted in zip(torch.autograd.grad(sums.loss, [hidden, head]), torch.autograd.grad(expected.loss, [hidden, head])):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-10)


def test_logits_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 rows of 256 tokens under a budget of 64 rows: nothing, temporaries included, comes near [N, V]."""
    monkeypatch.setattr(chunked, "CPU_LIMITS", BlockLimits(64 * 256 * 5 * 4))
    hidden, head = torch.randn(512, 8, requires_grad=True), torch.randn(256, 8, requires_grad=True)
    teacher = TeacherHidden(torch.randn(512, 8), torch.randn(256, 8))
    labels = torch.randint(0, 256, (512,))
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        with watching() as watch:
            settings = LossSettings(divergence=divergence, temperature=2.0, hard_weight=0.5)  # pyright: ignore[reportArgumentType]
            linear_divergence(hidden, head, teacher, labels, settings, v_eff=256).loss.backward()
        assert watch.largest == 64 * 256 * 5, "the workspace is the largest tensor"
        assert max(rows for rows, _, columns in watch.products if columns == 256) == 64


def test_masked_rows_are_not_multiplied(case) -> None:
    own = case(13, masked=True)
    own.leaves()
    with watching() as watch:
        own.sums(LossSettings(), "chunked")
    kept = int((own.labels != -100).sum())
    assert 0 < kept < 13
    assert [rows for rows, _, columns in watch.products if columns == own.v_eff] == [kept, kept]


@pytest.mark.parametrize(("hidden", "head", "extra"), [(True, True, 2), (True, False, 1), (False, True, 1), (False, False, 0)])
def test_what_is_frozen_costs_no_product(case, hidden: bool, head: bool, extra: int) -> None:
    """Two products make the logits; each wanted gradient is one more."""
    own = case(13)
    own.hidden.requires_grad_(hidden)
    own.head.requires_grad_(head)
    with watching() as watch:
        sums = own.sums(LossSettings(), "chunked")
        if hidden or head:
            sums.loss.backward()
    assert len(watch.products) == 2 + extra
    assert sums.loss.requires_grad == (hidden or head)
    assert (own.hidden.grad is not None, own.head.grad is not None) == (hidden, head)


def test_no_grad_computes_no_gradient(case) -> None:
    own = case(13)
    own.leaves()
    with torch.no_grad(), watching() as watch:
        sums = own.sums(LossSettings(), "chunked")
    assert len(watch.products) == 2
    assert not sums.loss.requires_grad


def test_inputs_are_left_as_they_are(case) -> None:
    own = case(13, bias=True, capped=True)
    before = own.to(torch.float64)
    before = {name: value.clone() for name, value in vars(before).items() if isinstance(value, Tensor)}
    own.leaves()
    logits = own.teacher_logits()
    kept = logits.logits.clone()
    settings = LossSettings(divergence="jsd", temperature=2.0, hard_weight=0.5)
    own.sums(settings, "chunked").loss.backward()
    own.sums(settings, "chunked", teacher=logits).loss.backward()
    torch.testing.assert_close(logits.logits, kept, rtol=0, atol=0, equal_nan=True)
    for name, value in before.items():
        torch.testing.assert_close(getattr(own, name).detach(), value, rtol=0, atol=0, equal_nan=True)


def test_second_derivatives_are_refused(case) -> None:
    own = case(5, masked=False)
    leaves = own.leaves()
    (gradient, _) = torch.autograd.grad(own.sums(LossSettings(), "chunked").loss.square(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_sums_are_no_views(case: Callable[..., Any]) -> None:
    """FSDP2 hooks a module's outputs, and warns users of every one that is a view."""
    made = case().to(torch.float32)
    made.leaves()
    sums = made.sums(LossSettings(), "chunked")
    assert all(part._base is None for part in vars(sums).values())


def test_an_unused_loss_leaves_other_gradients_alone(case) -> None:
    own = case(5, masked=False)
    own.leaves()
    sums = own.sums(LossSettings(), "chunked")
    (own.hidden.sum() + sums.kl).backward()
    assert torch.equal(own.hidden.grad, torch.ones_like(own.hidden))
    assert own.head.grad is None


@pytest.mark.parametrize(
    ("rows", "v_eff", "limits", "expected"),
    [
        (2048, 1000, BlockLimits(4 * 5 * 1000 * 512), 512),
        (1030, 1000, BlockLimits(4 * 5 * 1000 * 512), 344),  # three equal blocks, not two of 512 and a rest of 6
        (2048, 128_000, BlockLimits(2**20), 64),  # never fewer than 64
        (2048, 1000, BlockLimits(2**30, 256), 256),
        (7, 1000, BlockLimits(2**30, 256), 7),
        (0, 1000, BlockLimits(2**30), 1),
    ],
)
def test_rows_of_a_block(rows: int, v_eff: int, limits: BlockLimits, expected: int) -> None:
    assert rows_per_block(rows, v_eff, 5, 4, limits) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_the_reference(case, dtype: torch.dtype) -> None:
    own = case(13, bias=True, capped=True).to(dtype)
    moved = {name: value.cuda() for name, value in vars(own).items() if isinstance(value, Tensor)}
    for name, value in moved.items():
        setattr(own, name, value)
    leaves = own.leaves()
    settings = LossSettings(divergence="jsd", temperature=2.0, hard_weight=0.25)
    results = [own.sums(settings, backend) for backend in ("chunked", "reference")]
    for name in FIGURES:
        torch.testing.assert_close(*(getattr(sums, name) for sums in results), rtol=1e-4, atol=1e-3)
    for got, wanted in zip(*(torch.autograd.grad(sums.loss, leaves) for sums in results)):
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-3 * wanted.abs().max().item())
