"""Small distillation problems, and an oracle in fp64 that shares no code with decoct."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from decoct.losses.linear_divergence import TeacherHidden, TeacherLogits, linear_divergence
from decoct.losses.settings import LossSettings
from decoct.losses.sums import LossSums

V_EFF = 61


@dataclass
class Cap:
    """A transform of logits, as models describe theirs."""

    logit_scale: float
    softcap: float | None


@dataclass
class Case:
    """Tensors of one problem. Student and teacher share a vocabulary of 61 tokens, padded to 64 and 72, and differ in width."""

    hidden: Tensor
    head: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor
    teacher_head: Tensor
    teacher_bias: Tensor | None
    labels: Tensor
    transform: Cap | None = None
    teacher_transform: Cap | None = None
    v_eff: int = V_EFF

    def to(self, dtype: torch.dtype) -> "Case":
        """The same with all floating tensors in ``dtype``, as new leaves."""
        moved = {
            name: value.detach().to(dtype) for name, value in vars(self).items() if isinstance(value, Tensor) and value.is_floating_point()
        }
        return replace(self, **moved)

    def leaves(self) -> list[Tensor]:
        """What gets gradients: hidden states, head, bias."""
        return [leaf.requires_grad_() for leaf in (self.hidden, self.head, self.bias) if leaf is not None]

    def part(self, rows: slice) -> "Case":
        """Some of the rows; heads and bias are the same tensors."""
        return replace(self, hidden=self.hidden[rows], teacher_hidden=self.teacher_hidden[rows], labels=self.labels[rows])

    def sums(self, settings: LossSettings, backend: Any, **changed: Any) -> LossSums:
        """What decoct says."""
        source = TeacherHidden(self.teacher_hidden, self.teacher_head, self.teacher_bias, self.teacher_transform)
        arguments: dict[str, Any] = {
            "teacher": source,
            "labels": self.labels,
            "settings": settings,
            "v_eff": self.v_eff,
            "student_bias": self.bias,
            "student_transform": self.transform,
            "backend": backend,
        }
        return linear_divergence(self.hidden, self.head, **{**arguments, **changed})

    def teacher_logits(self) -> TeacherLogits:
        """The same teacher, by its logits; padding columns hold NaN."""
        logits = _logits(self.teacher_hidden, self.teacher_head, self.teacher_bias, self.teacher_transform)
        logits[:, self.v_eff :] = torch.nan
        return TeacherLogits(logits)


def make_case(rows: int = 13, *, bias: bool = False, capped: bool = False, masked: bool = True, gap: float = 0.1, seed: int = 0) -> Case:
    """Sharp logits (standard deviation 8) of a teacher, and a student that nearly agrees with it. Padding rows hold NaN."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width, wider = 19, 25
    hidden, head = randn(rows, width), randn(64, width) * 8 / width**0.5
    # the teacher sees what the student sees, and six features more that make the gap
    teacher_hidden = torch.cat([hidden, randn(rows, wider - width)], 1)
    teacher_head = torch.cat([torch.cat([head, randn(8, width)]), randn(72, wider - width) * gap / (wider - width) ** 0.5], 1)
    head[V_EFF:], teacher_head[V_EFF:] = torch.nan, torch.nan
    labels = torch.randint(0, V_EFF, (rows,), generator=generator)
    if masked:
        labels[torch.arange(rows) % 3 == 1] = -100
        hidden[labels == -100], teacher_hidden[labels == -100] = torch.nan, torch.nan
    cap = Cap(logit_scale=0.75, softcap=20.0) if capped else None
    student_bias, teacher_bias = (randn(64), randn(72)) if bias else (None, None)
    return Case(hidden, head, student_bias, teacher_hidden, teacher_head, teacher_bias, labels, cap, cap)


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None, transform: Cap | None) -> Tensor:
    logits = hidden @ head.T if bias is None else hidden @ head.T + bias
    if transform is None:
        return logits
    logits = logits * transform.logit_scale
    return logits if transform.softcap is None else torch.tanh(logits / transform.softcap) * transform.softcap


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def oracle(case: Case, settings: LossSettings, *, teacher: bool = True) -> dict[str, Tensor]:
    """Sums by the definitions, in probabilities, token by token, in fp64; ``loss`` has a graph to ``case``'s tensors."""
    assert case.hidden.dtype == torch.float64
    zero = torch.zeros((), dtype=torch.float64)
    sums: dict[str, Tensor] = dict.fromkeys(("loss", "kl", "cross_entropy", "teacher_entropy", "top1_matches", "tokens"), zero)
    for row in [row for row in range(len(case.labels)) if case.labels[row] != -100]:
        z = _logits(case.hidden[row], case.head[: case.v_eff], _cut(case.bias, case.v_eff), case.transform)
        hard, best = -z.softmax(0)[case.labels[row]].log(), case.labels[row]
        loss = hard
        if teacher:
            y = _logits(
                case.teacher_hidden[row], case.teacher_head[: case.v_eff], _cut(case.teacher_bias, case.v_eff), case.teacher_transform
            )
            loss, best = _oracle_loss(z, y, hard, settings), y.argmax()
            sums["kl"] = sums["kl"] + _kl(y.softmax(0), z.softmax(0))
            sums["teacher_entropy"] = sums["teacher_entropy"] - (y.softmax(0) * y.softmax(0).log()).sum()
        sums["loss"] = sums["loss"] + loss
        sums["cross_entropy"] = sums["cross_entropy"] + hard
        sums["top1_matches"] = sums["top1_matches"] + (z.argmax() == best)
        sums["tokens"] = sums["tokens"] + 1
    return sums


def _cut(bias: Tensor | None, v_eff: int) -> Tensor | None:
    return None if bias is None else bias[:v_eff]


def divergence_oracle(p: Tensor, q: Tensor, settings: LossSettings) -> Tensor:
    """The divergence of one token by its definition, in probabilities [V]; gradients flow into q."""
    name, alpha, beta = settings.divergence, settings.alpha or 0.0, settings.beta or 0.0
    if name == "adaptive_kl":
        assert settings.head_mass is not None
        gap = (p - q).abs().detach().tolist()
        ordered = sorted(range(len(p)), key=lambda v: -p[v].item())
        before = [sum(p[ordered[:place]].tolist()) for place in range(len(p))]
        head = {v for v, mass in zip(ordered, before) if mass < settings.head_mass}
        inside, whole = sum(gap[v] for v in head), sum(gap)
        weight = inside / whole if whole else 0.5
        return weight * _kl(p, q) + (1 - weight) * _kl(q, p)
    if name == "symmetric_kl":
        assert settings.balance is not None
        return settings.balance * _kl(p, q) + (1 - settings.balance) * _kl(q, p)
    if name in ("jsd", "gkd_jsd"):
        m = beta * p + (1 - beta) * q
        published = beta * _kl(p, m) + (1 - beta) * _kl(q, m)
        return published if name == "gkd_jsd" else published / (beta * (1 - beta))
    return {
        "forward_kl": lambda: _kl(p, q),
        "reverse_kl": lambda: _kl(q, p),
        "skew_forward_kl": lambda: _kl(p, alpha * p + (1 - alpha) * q),
        "skew_reverse_kl": lambda: _kl(q, (1 - alpha) * p + alpha * q),
        "total_variation": lambda: (p - q).abs().sum() / 2,
    }[name]()


def _oracle_loss(z: Tensor, y: Tensor, hard: Tensor, settings: LossSettings) -> Tensor:
    if settings.temperature is None:
        return hard
    soft = divergence_oracle((y / settings.temperature).softmax(0), (z / settings.temperature).softmax(0), settings)
    if settings.t_squared:
        soft = soft * settings.temperature**2
    return (1 - settings.hard_weight) * soft + settings.hard_weight * hard


@pytest.fixture
def case() -> Callable[..., Case]:
    """``make_case``."""
    return make_case


@pytest.fixture
def truth() -> Callable[..., dict[str, Tensor]]:
    """``oracle``."""
    return oracle
