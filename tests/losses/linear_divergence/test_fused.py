"""The Triton back end against the oracle in fp64: every divergence, value and gradients.

With TRITON_INTERPRET=1 the tests run on the CPU: ``test_interpreter.py`` starts a process of its own for that, because the
variable counts when triton is first imported. Otherwise they need a CUDA device.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from decoct.losses.linear_divergence import TeacherHidden, TeacherLogits, fused, linear_divergence
from decoct.losses.linear_divergence.fused import fused_sums
from decoct.losses.linear_divergence.inputs import HiddenStates, checked_problem
from decoct.losses.linear_divergence.reference import reference_sums
from decoct.losses.settings import DIVERGENCES, Divergence, LossSettings

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# numpy, which the interpreter computes with, warns where IEEE arithmetic gives infinities and NaN
NUMPY_WARNINGS = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")
pytestmark = [NUMPY_WARNINGS] if INTERPRETED else [pytest.mark.gpu]

FIGURES = ("loss", "kl", "cross_entropy", "teacher_entropy", "top1_matches", "tokens")
DIALS = {"jsd": "beta", "gkd_jsd": "beta", "skew_forward_kl": "alpha", "skew_reverse_kl": "alpha", "symmetric_kl": "balance"}
# relative to the largest element, of figures at least to 1: logits of size 30 in fp32 are good to 2e-6 each, and so is a sum of theirs
CLOSE = 2e-5


def settings_of(divergence: Divergence, **given: Any) -> LossSettings:
    """Settings with the divergence's own dial away from its default."""
    return LossSettings(divergence=divergence, **({DIALS[divergence]: 0.3} if divergence in DIALS else {}), **given)


def moved(case: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A copy in ``dtype`` on the device under test."""
    own = case.to(dtype)
    for name, value in vars(own).items():
        if isinstance(value, Tensor):
            setattr(own, name, value.to(DEVICE))
    return own


def close(name: str, got: Tensor, expected: Tensor, tolerance: float = CLOSE) -> None:
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    assert got.shape == expected.shape, name
    if not got.numel():
        return
    scale = max(expected.abs().max().item(), 1e-3 if got.ndim else 1.0)
    error = (got - expected).abs().max().item()
    assert error <= tolerance * scale, f"{name} {tuple(got.shape)}: max abs error {error:.3g}, relative {error / scale:.3g}"


def check(own: Any, truth: Any, settings: LossSettings, *, tolerance: float = CLOSE, **changed: Any) -> None:
    """Figures and gradients of ``own`` against the oracle on the same rounded numbers."""
    leaves = own.leaves()
    sums = own.sums(settings, "triton", **changed)
    exact = own.to(torch.float64)
    for name, value in vars(exact).items():
        if isinstance(value, Tensor):
            setattr(exact, name, value.cpu())
    exact_leaves = exact.leaves()
    expected = truth(exact, settings, **({"teacher": False} if changed.get("teacher", 1) is None else {}))
    for name in FIGURES:
        close(name, getattr(sums, name), expected[name], tolerance)
    wanted = torch.autograd.grad(expected["loss"], exact_leaves, materialize_grads=True)
    for name, got, gradient in zip(("hidden", "head", "bias"), torch.autograd.grad(sums.loss, leaves), wanted):
        close(f"gradient of {name}", got, gradient, tolerance)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers start as NaN: what the kernel does not write is seen."""
    plain = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        return plain(*size, **options).fill_(torch.nan)

    monkeypatch.setattr(fused.torch, "empty", empty)


@pytest.fixture
def case(case: Callable[..., Any]) -> Callable[..., Any]:
    """Problems of 7 rows where the interpreter computes each row for most of a tenth of a second: a program has one row, so others show
    it nothing new; rows 1 and 4 are masked. More rows, in blocks of every size, are a test of their own."""

    def make(rows: int = 7 if INTERPRETED else 13, **given: Any) -> Any:
        return case(rows, **given)

    return make


@pytest.mark.parametrize("hard", [0.0, 0.25])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence(case, truth, divergence: Divergence, temperature: float, hard: float) -> None:
    """Sharp, nearly equal logits; masked rows and padding rows hold NaN, which must reach nothing."""
    check(moved(case(bias=True)), truth, settings_of(divergence, temperature=temperature, hard_weight=hard))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_soft_cap_and_scale(case, truth, divergence: Divergence) -> None:
    check(moved(case(bias=True, capped=True)), truth, settings_of(divergence, temperature=2.0, hard_weight=0.25))


def test_scale_without_cap(case, truth) -> None:
    own = moved(case(capped=True))
    own.transform.softcap = own.teacher_transform.softcap = None
    check(own, truth, LossSettings(divergence="reverse_kl", hard_weight=0.5))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_cross_entropy_alone_and_beside_a_teacher(case, truth, bias: bool, masked: bool) -> None:
    settings = LossSettings(hard_weight=1.0)
    check(moved(case(bias=bias, masked=masked)), truth, settings, teacher=None)
    check(moved(case(bias=bias, masked=masked)), truth, settings)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", ["forward_kl", "adaptive_kl"])
def test_teacher_by_its_logits_in_any_dtype_and_stride(case, divergence: Divergence, dtype: torch.dtype, masked: bool) -> None:
    own = moved(case(bias=True, masked=masked))
    logits = own.teacher_logits().logits.to(dtype)
    strided = torch.stack([logits, torch.full_like(logits, torch.nan)], -1)[..., 0]
    settings = settings_of(divergence, temperature=2.0, hard_weight=0.25)
    for given in (logits, strided):
        leaves = own.leaves()
        got = own.sums(settings, "triton", teacher=TeacherLogits(given))
        expected = own.sums(settings, "reference", teacher=TeacherLogits(logits.float()))
        for name in FIGURES:
            close(name, getattr(got, name), getattr(expected, name))
        for mine, theirs in zip(torch.autograd.grad(got.loss, leaves), torch.autograd.grad(expected.loss, leaves)):
            close("gradient", mine, theirs)


@pytest.mark.parametrize(("rows", "slope_rows"), [(1, 1), (2, 4), (3, 6), (5, 100), (100, 100)])
@pytest.mark.parametrize("masked", [False, True])
def test_any_block_size_gives_the_same(case, rows: int, slope_rows: int, masked: bool) -> None:
    own = moved(case(13, bias=True, capped=True, masked=masked))
    leaves = own.leaves()
    teacher = TeacherHidden(own.teacher_hidden, own.teacher_head, own.teacher_bias, own.teacher_transform)
    settings = settings_of("jsd", temperature=2.0, hard_weight=0.25)
    problem = checked_problem(HiddenStates(own.hidden, own.head, own.bias, own.transform), teacher, own.labels, settings, own.v_eff)
    sums, expected = fused_sums(problem, rows=rows, slope_rows=slope_rows), reference_sums(problem)
    for name in FIGURES:
        close(name, getattr(sums, name), getattr(expected, name))
    for got, wanted in zip(torch.autograd.grad(sums.loss, leaves), torch.autograd.grad(expected.loss, leaves)):
        close("gradient", got, wanted)


@pytest.mark.parametrize(("vocab", "padding", "width"), [(1, 0, 1), (2, 3, 5), (17, 1, 3), (64, 0, 8), (4097, 6, 4), (9000, 0, 4)])
@pytest.mark.parametrize("divergence", ["forward_kl", "skew_forward_kl", "adaptive_kl"])
def test_odd_sizes_and_vocabularies_wider_than_a_block(divergence: Divergence, vocab: int, padding: int, width: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(3, 2 * width, generator=generator)[:, ::2].to(DEVICE).requires_grad_()  # strided
    head = torch.randn(width, vocab + padding, generator=generator).T.to(DEVICE).requires_grad_()  # transposed
    teacher = TeacherHidden(torch.randn(3, 2, generator=generator).to(DEVICE), torch.randn(vocab, 2, generator=generator).to(DEVICE))
    labels = torch.tensor([vocab - 1, -100, 0], device=DEVICE)
    settings = settings_of(divergence, hard_weight=0.5)
    got, expected = (
        linear_divergence(hidden, head, teacher, labels, settings, v_eff=vocab, backend=backend) for backend in ("triton", "reference")
    )
    for name in FIGURES:
        close(name, getattr(got, name), getattr(expected, name))
    for mine, theirs in zip(torch.autograd.grad(got.loss, [hidden, head]), torch.autograd.grad(expected.loss, [hidden, head])):
        close("gradient", mine, theirs)


@pytest.mark.parametrize("rows", [0, 5])
def test_no_tokens_give_zero_with_a_graph(case, rows: int) -> None:
    own = moved(case(rows, bias=True))
    own.labels.fill_(-100)
    leaves = own.leaves()
    sums = own.sums(LossSettings(), "triton")
    assert [getattr(sums, name).item() for name in FIGURES] == [0] * 6
    sums.loss.backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() == 0 for leaf in leaves)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_models_far_apart_and_equal_ones(divergence: Divergence) -> None:
    student = torch.tensor([[200.0, -200.0, 0.0]], device=DEVICE, requires_grad=True)
    head, label = torch.eye(3, device=DEVICE), torch.tensor([0], device=DEVICE)
    for teacher in (torch.tensor([[-200.0, 200.0, 0.0]]), torch.tensor([[200.0, -200.0, 0.0]])):
        settings = settings_of(divergence, temperature=0.5)
        got, expected = (
            linear_divergence(student, head, TeacherLogits(teacher.to(DEVICE)), label, settings, v_eff=3, backend=backend)
            for backend in ("triton", "reference")
        )
        close("loss", got.loss, expected.loss)
        assert got.loss.isfinite()
        # logits of 400 are good to 3e-5
        close("gradient", *(torch.autograd.grad(sums.loss, student)[0] for sums in (got, expected)), tolerance=1e-4)


@pytest.mark.parametrize(("hidden", "head"), [(True, False), (False, True), (False, False)])
def test_what_is_frozen_gets_nothing(case, hidden: bool, head: bool) -> None:
    own = moved(case(13))
    own.hidden.requires_grad_(hidden)
    own.head.requires_grad_(head)
    sums = own.sums(LossSettings(), "triton")
    assert sums.loss.requires_grad == (hidden or head)
    if hidden or head:
        sums.loss.backward()
    assert (own.hidden.grad is not None, own.head.grad is not None) == (hidden, head)


def test_nan_in_a_row_is_seen(case) -> None:
    own = moved(case(5, masked=False))
    own.hidden[2] = torch.nan
    assert own.sums(LossSettings(), "triton").loss.isnan()


def test_fp64_is_refused_by_name_and_left_to_another_back_end_by_auto(case) -> None:
    own = moved(case(5), torch.float64)
    with pytest.raises(ValueError, match=r"backend='triton' takes float32, bfloat16 and float16, not torch\.float64"):
        own.sums(LossSettings(), "triton")
    assert own.sums(LossSettings(), "auto").loss.dtype == torch.float64


@pytest.mark.skipif(INTERPRETED, reason="bf16 products are fp32 ones on a CPU")
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bf16_gradients_are_five_times_nearer_than_those_of_rounded_logits(case, truth, divergence: Divergence) -> None:
    own = moved(case(64, masked=False), torch.bfloat16)
    settings = settings_of(divergence)
    exact = own.to(torch.float64)
    for name, value in vars(exact).items():
        if isinstance(value, Tensor):
            setattr(exact, name, value.cpu())
    (wanted,) = torch.autograd.grad(truth(exact, settings)["loss"], [exact.leaves()[0]])
    own.hidden = own.hidden.float().requires_grad_()  # its gradient is then seen before the cast to bf16

    def error(gradient: Tensor) -> float:
        return ((gradient.double().cpu() - wanted).norm() / wanted.norm()).item()

    (got,) = torch.autograd.grad(own.sums(settings, "triton").loss, [own.hidden])
    rounded = (own.hidden.bfloat16() @ own.head[: own.v_eff].T).detach().float().requires_grad_()
    theirs = (own.teacher_hidden @ own.teacher_head[: own.v_eff].T).float()
    loss = linear_divergence(rounded, torch.eye(own.v_eff, device=DEVICE), TeacherLogits(theirs), own.labels, settings, v_eff=own.v_eff)
    (slope,) = torch.autograd.grad(loss.loss, [rounded])
    assert 5 * error(got) < error(slope @ own.head[: own.v_eff].float())
