"""Directions, limits and precision of the divergences, against fp64 and against torch's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decoct.losses.choice import FUNCTIONS, chosen_divergence
from decoct.losses.divergences import adaptive_kl, cross_entropy, forward_kl, head_threshold, reverse_kl, symmetric_kl, teacher_entropy
from decoct.losses.mixtures import gkd_jsd, jsd, skew_forward_kl, skew_reverse_kl
from decoct.losses.settings import DIVERGENCES, Divergence, LossSettings

ALL = tuple(function for function, _ in FUNCTIONS.values())
SMOOTH = tuple(function for name, (function, _) in FUNCTIONS.items() if name not in ("total_variation", "adaptive_kl"))
# fp32 logits of size 30 are known to 2e-6, and so is each log-probability
FP32_ABSOLUTE = 2e-5


def sharp_pair(rows: int = 6, vocab: int = 50, gap: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sharp logits (standard deviation 8) and others close to them, fp64."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * 8
    return teacher + gap * torch.randn(rows, vocab, generator=generator, dtype=torch.float64), teacher


def test_directions_on_an_asymmetric_pair() -> None:
    """Teacher (1/2, 1/2), student (9/10, 1/10): numbers worked out by hand."""
    teacher = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    student = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    teacher_to_student = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    student_to_teacher = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert teacher_to_student == pytest.approx(0.5108, abs=1e-4)
    assert student_to_teacher == pytest.approx(0.3681, abs=1e-4)
    assert forward_kl(student, teacher).item() == pytest.approx(teacher_to_student, rel=1e-12)
    assert reverse_kl(student, teacher).item() == pytest.approx(student_to_teacher, rel=1e-12)


def test_jsd_is_the_published_one_divided_by_beta_one_minus_beta() -> None:
    student, teacher = sharp_pair(gap=2.0)
    p, q = teacher.softmax(-1), student.softmax(-1)
    for beta in (0.1, 0.5, 0.9):
        m = beta * p + (1 - beta) * q
        published = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
        torch.testing.assert_close(jsd(student, teacher, beta=beta), published / (beta * (1 - beta)), rtol=1e-9, atol=1e-12)


def test_jsd_runs_into_both_kls() -> None:
    student, teacher = sharp_pair(gap=0.5)
    torch.testing.assert_close(jsd(student, teacher, beta=1e-7), forward_kl(student, teacher), rtol=1e-5, atol=0)
    torch.testing.assert_close(jsd(student, teacher, beta=1 - 1e-7), reverse_kl(student, teacher), rtol=1e-5, atol=0)


def test_jsd_is_finite_with_its_gradient_for_distributions_far_apart() -> None:
    student = torch.tensor([[400.0, -400.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-400.0, 400.0, 0.0]])
    value = jsd(student, teacher, beta=0.25)
    value.sum().backward()
    # disjoint: KL(p || m) = -log beta, KL(q || m) = -log(1 - beta)
    expected = (-0.25 * math.log(0.25) - 0.75 * math.log(0.75)) / (0.25 * 0.75)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("divergence", ALL)
def test_fp32_agrees_with_fp64_for_sharp_nearly_equal_logits(divergence, temperature: float) -> None:
    student, teacher = sharp_pair(rows=64)
    # the same rounded logits on both sides: only the arithmetic differs
    student, teacher = student.float(), teacher.float()
    value = divergence(student, teacher, temperature=temperature)
    exact = divergence(student.double(), teacher.double(), temperature=temperature)
    assert (value.dtype, exact.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=FP32_ABSOLUTE / temperature)


def test_jsd_keeps_its_digits_for_a_small_beta() -> None:
    """By differences of logarithms the error is divided by beta."""
    student, teacher = (logits.float() for logits in sharp_pair(rows=64))
    exact = jsd(student.double(), teacher.double(), beta=1e-3)
    torch.testing.assert_close(jsd(student, teacher, beta=1e-3).double(), exact, rtol=1e-3, atol=FP32_ABSOLUTE)


@pytest.mark.parametrize("divergence", SMOOTH)
def test_gradients_are_right(divergence) -> None:
    student, teacher = sharp_pair(rows=2, vocab=5, gap=1.0)
    student, teacher = (student / 8).requires_grad_(), (teacher / 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: divergence(s, t, temperature=1.7), (student, teacher))


def test_kls_equal_torchs_own_with_its_reversed_arguments() -> None:
    student, teacher = sharp_pair(gap=1.0)
    log_q, log_p = (student / 3).log_softmax(-1), (teacher / 3).log_softmax(-1)
    torch_forward = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch_reverse = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(forward_kl(student, teacher, temperature=3.0), torch_forward)
    torch.testing.assert_close(reverse_kl(student, teacher, temperature=3.0), torch_reverse)


def test_cross_entropy_equals_torchs_and_soft_targets_have_the_entropy_as_floor() -> None:
    student, teacher = sharp_pair(gap=1.0)
    labels = torch.arange(len(student))
    torch.testing.assert_close(cross_entropy(student, labels), F.cross_entropy(student, labels, reduction="none"))
    soft = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(forward_kl(student, teacher) + teacher_entropy(teacher), soft)
    assert teacher_entropy(torch.zeros(1, 8), temperature=3.0).item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_chosen_divergence_is_the_named_one_with_its_dial(name: Divergence) -> None:
    student, teacher = sharp_pair(gap=1.0)
    function, dial = FUNCTIONS[name]
    given: dict[str, float] = {dial: 0.3} if dial else {}
    chosen = chosen_divergence(student, teacher, LossSettings(divergence=name, temperature=2.0, **given))  # pyright: ignore[reportArgumentType]
    assert torch.equal(chosen, function(student, teacher, temperature=2.0, **given))
    assert function.__name__ == name


def test_gkd_jsd_is_the_published_one() -> None:
    student, teacher = sharp_pair(gap=2.0)
    torch.testing.assert_close(gkd_jsd(student, teacher, beta=0.1), 0.09 * jsd(student, teacher, beta=0.1))


def test_skew_kls_by_their_definition_and_their_limit() -> None:
    student, teacher = sharp_pair(gap=2.0)
    p, q = teacher.softmax(-1), student.softmax(-1)
    for alpha in (0.1, 0.5, 0.9):
        mixed = alpha * p + (1 - alpha) * q
        torch.testing.assert_close(skew_forward_kl(student, teacher, alpha=alpha), (p * (p / mixed).log()).sum(-1), rtol=1e-9, atol=1e-12)
        mixed = (1 - alpha) * p + alpha * q
        torch.testing.assert_close(skew_reverse_kl(student, teacher, alpha=alpha), (q * (q / mixed).log()).sum(-1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(skew_forward_kl(student, teacher, alpha=1e-9), forward_kl(student, teacher), rtol=1e-5, atol=0)
    torch.testing.assert_close(skew_reverse_kl(student, teacher, alpha=1e-9), reverse_kl(student, teacher), rtol=1e-5, atol=0)


def test_symmetric_kl_has_both_ends() -> None:
    student, teacher = sharp_pair(gap=1.0)
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    torch.testing.assert_close(symmetric_kl(student, teacher, balance=0.2), 0.2 * forward + 0.8 * reverse)


def test_head_of_adaptive_kl_is_the_likeliest_tokens_up_to_its_mass() -> None:
    p = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]])
    heads = p >= head_threshold(p, 0.5)
    assert heads.tolist() == [[False, True, True, False], [True] * 4, [True, False, False, False]]


def test_adaptive_kl_follows_where_the_models_differ() -> None:
    """By hand: head = {0}; gaps 0.1 on the head and 0.1 on the tail give both KLs half."""
    p, q = torch.tensor([[0.6, 0.3, 0.1]]), torch.tensor([[0.5, 0.4, 0.1]])
    forward, reverse = forward_kl(q.log(), p.log()), reverse_kl(q.log(), p.log())
    torch.testing.assert_close(adaptive_kl(q.log(), p.log()), (forward + reverse) / 2)
    q = torch.tensor([[0.6, 0.1, 0.3]])  # all of the gap is in the tail
    torch.testing.assert_close(adaptive_kl(q.log(), p.log()), reverse_kl(q.log(), p.log()))


def test_total_variation_by_hand() -> None:
    p, q = torch.tensor([[0.6, 0.3, 0.1]]), torch.tensor([[0.1, 0.3, 0.6]])
    assert FUNCTIONS["total_variation"][0](q.log(), p.log()).item() == pytest.approx(0.5)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    scale=st.floats(0.01, 20),
    gap=st.floats(0, 20),
    temperature=st.floats(0.25, 8),
    beta=st.floats(0.01, 0.99),
    shift=st.floats(-50, 50),
)
def test_properties(seed: int, scale: float, gap: float, temperature: float, beta: float, shift: float) -> None:
    """Not negative, zero for equal models, blind to a constant added to all logits; jsd swaps with beta -> 1 - beta."""
    student, teacher = sharp_pair(rows=3, vocab=9, gap=gap, seed=seed)
    student, teacher = student * scale / 8, teacher * scale / 8
    for divergence in ALL:
        value = divergence(student, teacher, temperature=temperature)
        assert (value >= -1e-12).all()
        assert divergence(teacher, teacher, temperature=temperature).abs().max() < 1e-12
        if divergence is adaptive_kl:
            continue  # its head may change with the last bit of a probability
        torch.testing.assert_close(divergence(student + shift, teacher, temperature=temperature), value, rtol=1e-7, atol=1e-9)
    swapped = jsd(teacher, student, temperature=temperature, beta=1 - beta)
    torch.testing.assert_close(jsd(student, teacher, temperature=temperature, beta=beta), swapped, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("divergence", ALL)
def test_bad_input_is_refused(divergence) -> None:
    logits = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 5\).*slice both to the real vocabulary"):
        divergence(logits, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"temperature=0\.0 must be greater than 0"):
        divergence(logits, logits, temperature=0.0)


def test_ends_of_beta_and_negative_temperature_are_refused() -> None:
    logits = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"beta=1\.0 must lie strictly between 0 and 1; use forward_kl or reverse_kl"):
        jsd(logits, logits, beta=1.0)
    with pytest.raises(ValueError, match=r"temperature=-1\.0"):
        teacher_entropy(logits, temperature=-1.0)
