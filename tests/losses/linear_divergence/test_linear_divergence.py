"""Both back ends against an oracle in fp64, values and every gradient, by name."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from decoct.losses.divergences import forward_kl
from decoct.losses.linear_divergence import TeacherHidden, TeacherLogits, linear_divergence
from decoct.losses.settings import DIVERGENCES, Divergence, LossSettings
from decoct.losses.shift import shift_for_next_token

BACKENDS = ("reference", "chunked")
DIALS = {"jsd": "beta", "gkd_jsd": "beta", "skew_forward_kl": "alpha", "skew_reverse_kl": "alpha", "symmetric_kl": "balance"}


def settings_of(divergence: Divergence, **given: Any) -> LossSettings:
    """Settings with the divergence's own dial away from its default."""
    dial = {DIALS[divergence]: 0.3} if divergence in DIALS else {}
    return LossSettings(divergence=divergence, **dial, **given)


SETTINGS = [
    settings_of(divergence, temperature=temperature, hard_weight=hard)
    for divergence in DIVERGENCES
    for temperature in (0.7, 1.0, 2.0)
    for hard in (0.0, 0.25)
]
FIGURES = ("loss", "kl", "cross_entropy", "teacher_entropy", "top1_matches", "tokens")
# fp64 throughout: only the order of sums differs
EXACT = 1e-9
# Gradients of the whole batch, relative to their largest element. Products of fp32 with logits of size 30 are good to 1e-5, and the
# gradient is a difference of probabilities a tenth apart.
FP32 = 1e-3


def close(name: str, got: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    """Relative to the largest element, naming what differs."""
    assert got is not None
    assert expected is not None
    assert got.shape == expected.shape
    scale = max(expected.detach().abs().max().item(), 1e-6) if expected.numel() else 1.0
    error = (got.detach().double() - expected.detach().double()).abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance * scale, f"{name} {tuple(got.shape)}: max abs error {error:.3g}, relative {error / scale:.3g}"


def compare(case: Any, got_case: Any, sums: Any, expected: dict[str, Tensor], tolerance: float) -> None:
    """All figures and all gradients; ``case`` is the oracle's copy."""
    for name in FIGURES:
        close(name, getattr(sums, name), expected[name], tolerance)
    wanted = torch.autograd.grad(expected["loss"], case.leaves(), materialize_grads=True)
    got = torch.autograd.grad(sums.loss, got_case.leaves(), materialize_grads=True)
    for name, own, theirs in zip(("hidden", "head", "bias"), got, wanted):
        # padding and masked rows hold NaN in the inputs; the oracle never touches them
        close(f"gradient of {name}", own, theirs, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.divergence}-T{s.temperature}-hard{s.hard_weight}")
def test_value_and_gradients_fp64_and_fp32(case, truth, settings: LossSettings, backend: str) -> None:
    """Sharp, nearly equal logits; masked rows and padding rows hold NaN, which must reach nothing."""
    exact = case(bias=True)
    exact.leaves()
    expected = truth(exact, settings)
    double = exact.to(torch.float64)
    double.leaves()
    compare(exact, double, double.sums(settings, backend), expected, EXACT)
    single = exact.to(torch.float32)
    single.leaves()
    sums = single.sums(settings, backend)
    assert sums.loss.dtype == torch.float32
    rounded = single.to(torch.float64)
    rounded.leaves()
    compare(rounded, single, sums, truth(rounded, settings), FP32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.hard_weight == 0.25], ids=lambda s: f"{s.divergence}-T{s.temperature}")
def test_soft_cap_and_scale_reach_the_gradient(case, truth, settings: LossSettings, backend: str) -> None:
    exact = case(bias=True, capped=True)
    exact.leaves()
    own = exact.to(torch.float64)
    own.leaves()
    compare(exact, own, own.sums(settings, backend), truth(exact, settings), EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_without_cap(case, truth, backend: str) -> None:
    exact = case(capped=True)
    exact.transform.softcap = exact.teacher_transform.softcap = None
    exact.leaves()
    own = exact.to(torch.float64)
    own.leaves()
    settings = LossSettings(hard_weight=0.5)
    compare(exact, own, own.sums(settings, backend), truth(exact, settings), EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
def test_cross_entropy_alone(case, truth, bias: bool, backend: str) -> None:
    exact = case(bias=bias)
    exact.leaves()
    own = exact.to(torch.float64)
    own.leaves()
    settings = LossSettings(hard_weight=1.0)
    sums = own.sums(settings, backend, teacher=None)
    compare(exact, own, sums, truth(exact, settings, teacher=False), EXACT)
    assert (sums.kl.item(), sums.teacher_entropy.item()) == (0, 0)
    # a teacher beside it changes nothing but what is measured
    compare(exact, own, own.sums(settings, backend), truth(exact, settings), EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_teacher_by_logits_equals_teacher_by_hidden_states(case, backend: str) -> None:
    own = case(bias=True, capped=True)
    settings = LossSettings(temperature=2.0, hard_weight=0.25)
    by_hidden, by_logits = own.sums(settings, backend), own.sums(settings, backend, teacher=own.teacher_logits())
    for name in FIGURES:
        close(name, getattr(by_logits, name), getattr(by_hidden, name), EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_direction_on_an_asymmetric_pair(backend: str) -> None:
    """Teacher (1/2, 1/2), student (9/10, 1/10)."""
    student, teacher = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    labels = torch.tensor([0])
    pairs: list[tuple[Divergence, float]] = [
        ("forward_kl", 0.5 * math.log(25 / 9)),
        ("reverse_kl", 0.9 * math.log(1.8) + 0.1 * math.log(0.2)),
    ]
    for name, expected in pairs:
        settings = LossSettings(divergence=name)
        sums = linear_divergence(student, torch.eye(2), TeacherLogits(teacher), labels, settings, v_eff=2, backend=backend)  # pyright: ignore[reportArgumentType]
        assert sums.loss.item() == pytest.approx(expected, rel=1e-5), name
        assert sums.kl.item() == pytest.approx(0.5 * math.log(25 / 9), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_t_squared_scales_the_divergence_alone(case, backend: str) -> None:
    own = case()
    plain, scaled = (own.sums(LossSettings(temperature=3.0, t_squared=flag), backend) for flag in (False, True))
    close("loss", scaled.loss, 9 * plain.loss, EXACT)
    close("kl", scaled.kl, plain.kl, 0)
    hard = own.sums(LossSettings(hard_weight=1.0), backend)
    close("cross-entropy", hard.loss, plain.cross_entropy, EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("teacher", [True, False])
def test_no_tokens_give_zero_with_a_graph(case, rows: int, teacher: bool, backend: str) -> None:
    own = case(rows, bias=True)
    own.labels.fill_(-100)
    leaves = own.leaves()
    settings = LossSettings() if teacher else LossSettings(hard_weight=1.0)
    sums = own.sums(settings, backend) if teacher else own.sums(settings, backend, teacher=None)
    assert [getattr(sums, name).item() for name in FIGURES] == [0] * 6
    sums.loss.backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.abs().sum() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_models_have_no_loss_and_no_gradient(case, divergence: Divergence, backend: str) -> None:
    """To the last bit but for the sum of probabilities, which is 1 only nearly: any other remainder would be learnt as noise."""
    own = case().to(torch.float32)
    leaves = own.leaves()
    twin = TeacherHidden(own.hidden.detach(), own.head.detach())
    sums = own.sums(settings_of(divergence), backend, teacher=twin)
    assert abs(sums.loss.item()) < 1e-6
    for gradient in torch.autograd.grad(sums.loss, leaves):
        assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_models_far_apart_give_finite_numbers(divergence: Divergence, backend: str) -> None:
    student = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    teacher = TeacherLogits(torch.tensor([[-200.0, 200.0, 0.0]]))
    settings = settings_of(divergence, temperature=0.5)
    sums = linear_divergence(student, torch.eye(3), teacher, torch.tensor([0]), settings, v_eff=3, backend=backend)  # pyright: ignore[reportArgumentType]
    (gradient,) = torch.autograd.grad(sums.loss, student)
    assert sums.loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_halves_make_the_whole(case, backend: str) -> None:
    """Micro-batches: figures add up, and so do the gradients that accumulate."""
    settings = LossSettings(divergence="jsd", temperature=2.0, hard_weight=0.25)
    whole, halves = case(14, bias=True, seed=1), case(14, bias=True, seed=1)
    whole_leaves, half_leaves = whole.leaves(), halves.leaves()
    sums = whole.sums(settings, backend)
    parts = [halves.part(rows).sums(settings, backend) for rows in (slice(0, 5), slice(5, 14))]
    sums.loss.backward()
    for part in parts:
        part.loss.backward()
    for name in FIGURES:
        close(name, sum(getattr(part, name) for part in parts), getattr(sums, name), EXACT)  # pyright: ignore[reportArgumentType]
    for name, own, theirs in zip(("hidden", "head", "bias"), half_leaves, whole_leaves):
        close(f"gradient of {name}", own.grad, theirs.grad, EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_that_is_not_the_last_node(case, backend: str) -> None:
    """Times two plus a term that shares its inputs; and twice through a kept graph."""
    settings = LossSettings(hard_weight=0.25)
    own = case(masked=False)
    own.head = own.head[: own.v_eff].clone()
    leaves = own.leaves()
    plain = torch.autograd.grad(own.sums(settings, backend).loss, leaves)
    total = 2 * own.sums(settings, backend).loss + own.hidden.square().sum() + own.head.sum()
    for _ in range(2):
        hidden, head = torch.autograd.grad(total, leaves, retain_graph=True)
        close("gradient of hidden", hidden, 2 * plain[0] + 2 * own.hidden, EXACT)
        close("gradient of head", head, 2 * plain[1] + 1, EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tied_embeddings_accumulate(backend: str) -> None:
    """The head is also the input embedding: its gradient is the sum of both uses."""
    torch.manual_seed(0)
    ids, teacher = torch.randint(0, 12, (2, 6)), torch.randn(10, 12, dtype=torch.float64)

    def gradient(separate: bool) -> list[Tensor]:
        torch.manual_seed(1)
        embedding = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
        head = embedding.detach().clone().requires_grad_() if separate else embedding
        hidden, labels = shift_for_next_token(embedding[ids].tanh(), ids)
        sums = linear_divergence(hidden, head, TeacherLogits(teacher), labels, LossSettings(), v_eff=12, backend=backend)  # pyright: ignore[reportArgumentType]
        return list(torch.autograd.grad(sums.loss, [embedding, head] if separate else [embedding]))

    as_input, as_head = gradient(separate=True)
    (tied,) = gradient(separate=False)
    close("gradient of the tied matrix", tied, as_input + as_head, EXACT)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_inputs_are_multiplied_and_summed_in_fp32(case, truth, backend: str, autocast: bool) -> None:
    """The oracle sees the bf16 values; a product rounded to bf16 would be off by several tenths."""
    own = case(bias=True).to(torch.bfloat16)
    own.leaves()
    exact = own.to(torch.float64)
    exact.leaves()
    settings = LossSettings(temperature=2.0, hard_weight=0.25)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        sums = own.sums(settings, backend)
    assert sums.loss.dtype == torch.float32
    expected = truth(exact, settings)
    for name in FIGURES:
        close(name, getattr(sums, name), expected[name], FP32)
    sums.loss.backward()
    wanted = torch.autograd.grad(expected["loss"], exact.leaves())
    for name, leaf, gradient in zip(("hidden", "head", "bias"), own.leaves(), wanted):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.bfloat16
        close(f"gradient of {name}", leaf.grad, gradient, 2**-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing_for_fp32(case, backend: str) -> None:
    own = case(bias=True).to(torch.float32)
    leaves = own.leaves()
    plain = own.sums(LossSettings(), backend).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = own.sums(LossSettings(), backend).loss
    assert torch.equal(plain, cast)
    for own_gradient, theirs in zip(torch.autograd.grad(cast, leaves), torch.autograd.grad(plain, leaves)):
        assert torch.equal(own_gradient, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_teacher_gets_no_gradient_and_only_loss_has_a_graph(case, backend: str) -> None:
    own = case()
    own.leaves()
    own.teacher_hidden.requires_grad_()
    own.teacher_head.requires_grad_()
    sums = own.sums(LossSettings(hard_weight=0.5), backend)
    sums.loss.backward()
    assert own.teacher_hidden.grad is None
    assert own.teacher_head.grad is None
    assert sums.loss.requires_grad
    assert not any(getattr(sums, name).requires_grad for name in FIGURES[1:])


def test_bad_input_is_refused(case) -> None:
    own = case(masked=False, bias=True)
    soft = LossSettings(hard_weight=0.5)
    with pytest.raises(ValueError, match=r"hard_weight=0.5 needs a teacher"):
        own.sums(soft, "auto", teacher=None)
    with pytest.raises(ValueError, match="the student head has 64 rows, fewer than the 65 tokens"):
        own.sums(soft, "auto", v_eff=65)
    with pytest.raises(ValueError, match="v_eff=0"):
        own.sums(soft, "auto", v_eff=0)
    with pytest.raises(ValueError, match="covers 3 positions and the student 13"):
        own.sums(soft, "auto", teacher=TeacherLogits(torch.zeros(3, 70)))
    with pytest.raises(ValueError, match="the teacher head has 5 rows"):
        own.sums(soft, "auto", teacher=TeacherHidden(torch.zeros(13, 4), torch.zeros(5, 4)))
    with pytest.raises(ValueError, match="at least the 61 tokens"):
        own.sums(soft, "auto", teacher=TeacherLogits(torch.zeros(13, 60)))
    with pytest.raises(ValueError, match="the student bias of shape"):
        own.sums(soft, "auto", student_bias=torch.zeros(60))
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \[13\].*not torch.int32"):
        own.sums(soft, "auto", labels=own.labels.int())
    with pytest.raises(ValueError, match=r"label 61 is not a token of the vocabulary \(0 to 60\); mask positions"):
        own.sums(soft, "auto", labels=own.labels.clamp(min=61))
    with pytest.raises(ValueError, match="label -1 is not a token"):
        own.sums(soft, "auto", labels=torch.full_like(own.labels, -1))
    with pytest.raises(ValueError, match="backend='dense' is not one of auto, reference, chunked"):
        own.sums(soft, "dense")
    with pytest.raises(ValueError, match="backend='triton' cannot run on device cpu; use backend='auto', or set TRITON_INTERPRET=1"):
        own.to(torch.float32).sums(soft, "triton")
    with pytest.raises(ValueError, match="flatten batch and sequence"):
        linear_divergence(torch.zeros(2, 3, 4), own.head, None, own.labels, LossSettings(hard_weight=1.0), v_eff=4)


def test_kl_of_the_sums_is_the_divergence_of_the_logits(case) -> None:
    own = case(masked=False, gap=2.0)
    logits = (own.hidden @ own.head.T)[:, : own.v_eff]
    expected = forward_kl(logits, own.teacher_logits().logits[:, : own.v_eff]).sum()
    close("kl", own.sums(LossSettings(divergence="reverse_kl", temperature=4.0), "auto").kl, expected, EXACT)
