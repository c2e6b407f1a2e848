"""Tokens of probability 0, and divergences near 0: against textbook sums in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from decoct.losses.choice import FUNCTIONS
from decoct.losses.divergences import forward_kl, reverse_kl, symmetric_kl, teacher_entropy
from decoct.losses.evaluation import evaluation_sums
from decoct.losses.linear_divergence import TeacherHidden, TeacherLogits, linear_divergence
from decoct.losses.settings import DIVERGENCES, LossSettings

VOCAB, ROWS, WIDTH = 23, 9, 6
INFINITE = {
    "teacher cannot": ("reverse_kl", "symmetric_kl", "adaptive_kl"),
    "student cannot": ("forward_kl", "symmetric_kl", "adaptive_kl"),
    "neither can": (),
}


def kl(a: Tensor, b: Tensor) -> Tensor:
    """sum a log (a / b) over what a can say."""
    return torch.where(a > 0, a * (a.clamp(min=1e-300).log() - b.log().clamp(min=-1e300)), 0.0).sum(-1)


def textbook(settings: LossSettings, student: Tensor, teacher: Tensor, at: Tensor | None = None) -> Tensor:
    """Per token; ``at`` = the student that the weight of adaptive KL, a constant, is taken from."""
    temperature = settings.temperature or 1.0
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
    beta, alpha = settings.beta or 0.0, settings.alpha or 0.0
    mixture = beta * p + (1 - beta) * q
    gkd = beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)
    if settings.divergence == "adaptive_kl":
        away = (p - (q if at is None else (at / temperature).softmax(-1)).detach()).abs()
        ordered, places = torch.sort(p, dim=-1, descending=True, stable=True)
        head = torch.zeros_like(p).scatter(-1, places, ((ordered.cumsum(-1) - ordered) < (settings.head_mass or 0)).double())
        weight = (away * head).sum(-1) / away.sum(-1)
        return weight * kl(p, q) + (1 - weight) * kl(q, p)
    balance = settings.balance or 0.0
    values = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "symmetric_kl": lambda: balance * kl(p, q) + (1 - balance) * kl(q, p),
        "jsd": lambda: gkd / (beta * (1 - beta)),
        "gkd_jsd": lambda: gkd,
        "skew_forward_kl": lambda: kl(p, alpha * p + (1 - alpha) * q),
        "skew_reverse_kl": lambda: kl(q, (1 - alpha) * p + alpha * q),
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
    }
    return values[settings.divergence]()


def problem(who: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Hidden states, heads and biases; tokens 3 and 17 have a bias of -inf where ``who`` says."""
    generator = torch.Generator().manual_seed(0)
    parts = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in (
            ("hidden", (ROWS, WIDTH)), ("head", (VOCAB, WIDTH)), ("bias", (VOCAB,)),
            ("their_hidden", (ROWS, WIDTH)), ("their_head", (VOCAB, WIDTH)), ("their_bias", (VOCAB,)),
        )
    }  # fmt: skip
    for name in {"teacher cannot": ["their_bias"], "student cannot": ["bias"], "neither can": ["bias", "their_bias"]}[who]:
        parts[name][[3, 17]] = -torch.inf
    return parts


LABELS = torch.tensor([0, 5, -100, 9, 22, 1, 4, 8, 16])


@pytest.mark.parametrize("given", ["hidden", "logits"])
@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("who", INFINITE)
def test_back_ends_give_the_textbooks_sums(who: str, divergence: Any, temperature: float, backend: Any, given: str) -> None:
    settings = LossSettings(divergence=divergence, temperature=temperature, hard_weight=0.3)
    kept = LABELS >= 0
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        parts = problem(who, dtype)
        leaves = [parts[name].requires_grad_() for name in ("hidden", "head")]
        theirs = parts["their_hidden"] @ parts["their_head"].T + parts["their_bias"]
        hidden = TeacherHidden(parts["their_hidden"], parts["their_head"], parts["their_bias"])
        sums = linear_divergence(
            parts["hidden"], parts["head"], hidden if given == "hidden" else TeacherLogits(theirs), LABELS, settings,
            v_eff=VOCAB, student_bias=parts["bias"], backend=backend,
        )  # fmt: skip
        exact = {name: part.detach().double() for name, part in parts.items()}
        own = [exact[name].requires_grad_() for name in ("hidden", "head")]
        logits = (own[0] @ own[1].T + exact["bias"])[kept]
        teacher = (exact["their_hidden"] @ exact["their_head"].T + exact["their_bias"])[kept]
        cross = -logits.log_softmax(-1)[torch.arange(len(logits)), LABELS[kept]]
        p = teacher.softmax(-1)
        close: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(sums.teacher_entropy.double(), torch.special.entr(p).sum(), **close)
        torch.testing.assert_close(sums.cross_entropy.double(), cross.sum().detach(), **close)
        if who == "student cannot":
            assert float(sums.kl) == torch.inf
        else:
            torch.testing.assert_close(sums.kl.double(), kl(p, logits.softmax(-1)).sum().detach(), **close)
        if divergence in INFINITE[who]:
            assert float(sums.loss.detach()) == torch.inf
            continue
        loss = (settings.scale * textbook(settings, logits, teacher) + 0.3 * cross).sum()
        torch.testing.assert_close(sums.loss.double(), loss, **close)
        for got, wanted in zip(torch.autograd.grad(sums.loss, leaves), analytic(settings, own, logits, teacher, kept), strict=True):
            torch.testing.assert_close(got.double(), wanted, **close)


def analytic(settings: LossSettings, leaves: list[Tensor], logits: Tensor, teacher: Tensor, kept: Tensor) -> list[Tensor]:
    """Gradients of the mixed loss by central differences of the textbook's sums over the logits that can be said."""
    base, step = logits.detach(), 1e-5
    slope = torch.zeros_like(base)
    labels = LABELS[kept]

    def value(student: Tensor) -> Tensor:
        cross = -student.log_softmax(-1)[torch.arange(len(student)), labels]
        return settings.scale * textbook(settings, student, teacher, base) + settings.hard_weight * cross

    for token in range(VOCAB):
        if torch.isneginf(base[:, token]).all():
            continue
        up, down = base.clone(), base.clone()
        up[:, token] += step
        down[:, token] -= step
        slope[:, token] = (value(up) - value(down)) / (2 * step)
    whole = torch.zeros(len(LABELS), VOCAB, dtype=torch.float64)
    whole[kept] = slope
    hidden, head = (leaf.detach() for leaf in leaves)
    return [whole @ head, whole.T @ hidden]


def test_a_kernel_says_that_it_does_not_take_them() -> None:
    parts = problem("teacher cannot", torch.float32)
    teacher = TeacherHidden(parts["their_hidden"], parts["their_head"], parts["their_bias"])
    with pytest.raises(ValueError, match=r"logits of -inf.*backend='auto'"):
        linear_divergence(parts["hidden"], parts["head"], teacher, LABELS, LossSettings(), v_eff=VOCAB, backend="triton")


def test_minus_infinity_beyond_the_vocabulary_is_none() -> None:
    parts = problem("neither can", torch.float32)
    logits = torch.cat([torch.randn(ROWS, 17), torch.full((ROWS, 2), -torch.inf)], 1)
    sums = linear_divergence(parts["hidden"], parts["head"], TeacherLogits(logits), LABELS.clamp(max=16), LossSettings(), v_eff=17)
    assert bool(sums.loss.isfinite())


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_is_never_taken_for_an_impossible_token(divergence: Any, backend: Any) -> None:
    parts = problem("teacher cannot", torch.float32)
    parts["their_hidden"][3, 2] = torch.nan
    teacher = TeacherHidden(parts["their_hidden"], parts["their_head"], parts["their_bias"])
    sums = linear_divergence(
        parts["hidden"], parts["head"], teacher, LABELS, LossSettings(divergence=divergence), v_eff=VOCAB, backend=backend
    )
    assert not bool(sums.loss.isfinite())
    assert bool(sums.kl.isnan())


def test_evaluation_beside_a_teacher_that_cannot_say_everything() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, VOCAB, generator=generator) for _ in range(2))
    teacher[:, [2, 7]] = -torch.inf
    labels = torch.arange(5) + 8
    sums = evaluation_sums(student, teacher, labels)
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    assert sums.kl is not None
    torch.testing.assert_close(sums.kl.double(), kl(p, q), rtol=1e-5, atol=1e-6)
    swapped = evaluation_sums(teacher, student, labels)
    assert swapped.kl is not None
    assert swapped.kl.tolist() == [torch.inf] * 5
    torch.testing.assert_close(teacher_entropy(teacher).double(), torch.special.entr(p).sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_public_functions_have_finite_gradients_beside_impossible_tokens(name: Any) -> None:
    student = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1)).requires_grad_()
    teacher = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(2))
    teacher[:, 5] = -torch.inf
    (gradient,) = torch.autograd.grad(FUNCTIONS[name][0](student, teacher).sum(), student)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("gap", [3e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("vocab", [50, 32_000])
def test_small_divergences_are_right_in_fp32(gap: float, vocab: int) -> None:
    """Down to some 1e-9 nats, to one in a hundred: in fp32 a sum of p (log p - log q) ends in noise of 1e-7."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(6, vocab, generator=generator)
    student = teacher + gap * torch.randn(6, vocab, generator=generator)
    exact = teacher.double(), student.double()
    p, q = (x.softmax(-1) for x in exact)
    wanted = kl(p, q)
    for got in (forward_kl(student, teacher), evaluation_sums(student, teacher, torch.zeros(6, dtype=torch.int64)).kl):
        assert got is not None
        torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=1e-11)
        assert bool((got >= 0).all())
    torch.testing.assert_close(reverse_kl(student, teacher).double(), kl(q, p), rtol=2e-2, atol=1e-11)
    torch.testing.assert_close(symmetric_kl(student, teacher).double(), (kl(q, p) + kl(p, q)) / 2, rtol=2e-2, atol=1e-11)


def test_equal_models_are_at_no_distance_and_far_ones_do_not_overflow() -> None:
    logits = 5 * torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    assert forward_kl(logits, logits.clone()).tolist() == [0.0] * 3
    far = torch.tensor([[1e4, 0.0, -1e4, 5.0]])
    assert float(forward_kl(far, far.flip(1))) == pytest.approx(1e4 - 5 + 0.0, rel=1e-6)
