"""Inputs of linear_divergence: hidden states with their head, a teacher and labels, checked once for all back ends."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..settings import LossSettings
from ..shift import MASKED
from ..sparse import SparseTargets


class LogitTransform(Protocol):
    """How a model turns ``hidden @ head.T + bias`` into logits: ``x = logit_scale * x``, then ``softcap * tanh(x / softcap)``."""

    @property
    def logit_scale(self) -> float:
        """Factor on the logits, bias included; 1.0 = none."""
        ...

    @property
    def softcap(self) -> float | None:
        """Bound of the logits; None = none."""
        ...


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """The factors of logits that are not computed yet: ``transform(hidden @ head.T + bias)``."""

    hidden: Tensor
    """[N, H], any floating dtype."""
    head: Tensor
    """[V_padded, H] output embedding; rows beyond the real vocabulary are never read."""
    bias: Tensor | None = None
    """[V_padded] or None."""
    transform: LogitTransform | None = None
    """Scale and soft cap; None = neither."""

    def check(self, who: str, v_eff: int) -> None:
        """Raises ValueError, naming ``who``, if the parts do not fit each other or hold fewer than ``v_eff`` tokens."""
        hidden, head, bias = self.hidden, self.head, self.bias
        if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
            raise ValueError(
                f"{who} hidden states of shape {tuple(hidden.shape)} and head of shape {tuple(head.shape)} must be [N, H] and [V, H] "
                "with the same H; flatten batch and sequence with shift_for_next_token"
            )
        if len(head) < v_eff:
            raise ValueError(f"the {who} head has {len(head)} rows, fewer than the {v_eff} tokens of the vocabulary; check the tokenizer")
        if bias is not None and (bias.ndim != 1 or len(bias) < v_eff):
            raise ValueError(f"the {who} bias of shape {tuple(bias.shape)} must have one dimension and at least {v_eff} elements")

    def detached(self) -> "HiddenStates":
        """The same values without an autograd graph."""
        return HiddenStates(self.hidden.detach(), self.head.detach(), None if self.bias is None else self.bias.detach(), self.transform)


@dataclass(frozen=True, eq=False)
class TeacherHidden(HiddenStates):
    """A teacher given by last hidden states and head, so that its logits are never held either."""


@dataclass(frozen=True, eq=False)
class TeacherLogits:
    """A teacher given by logits that are already computed."""

    logits: Tensor
    """[N, V_padded], any floating dtype, final (scaled and capped); columns beyond the real vocabulary are never read."""

    def check(self, v_eff: int) -> None:
        """Raises ValueError if there are fewer than ``v_eff`` columns."""
        if self.logits.ndim != 2 or self.logits.shape[1] < v_eff:
            raise ValueError(
                f"teacher logits of shape {tuple(self.logits.shape)} must be [N, V] with at least the {v_eff} tokens of the vocabulary"
            )


TeacherLogitsSource = TeacherHidden | TeacherLogits | SparseTargets


@dataclass(frozen=True, eq=False)
class Problem:
    """The checked input of every back end."""

    student: HiddenStates
    teacher: HiddenStates | TeacherLogits | SparseTargets | None
    labels: Tensor
    settings: LossSettings
    v_eff: int
    kept: Tensor
    """[n] int64, ascending: the indices of the unmasked rows."""
    impossible: bool = False
    """Whether a bias or a teacher's logits hold -inf. Checked once, so that problems without -inf pay nothing for it."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation: fp64 if the student is fp64, else fp32."""
        # the teacher does not count: its numbers are converted to this dtype
        return torch.float64 if torch.float64 in (self.student.hidden.dtype, self.student.head.dtype) else torch.float32

    def covered_mass(self) -> Tensor:
        """Teacher's mass that is known exactly, summed over the unmasked rows: 0-dim."""
        if isinstance(self.teacher, SparseTargets):
            return self.teacher[self.kept].covered_mass().sum().to(self.dtype)
        return torch.tensor(0.0 if self.teacher is None else float(len(self.kept)), dtype=self.dtype, device=self.labels.device)


def checked_problem(
    student: HiddenStates, teacher: TeacherLogitsSource | None, labels: Tensor, settings: LossSettings, v_eff: int
) -> Problem:
    """Checks shapes, vocabularies and labels, and finds the unmasked rows.

    Raises:
        ValueError: as for ``linear_divergence``.
    """
    if v_eff < 1:
        raise ValueError(f"v_eff={v_eff} must be the number of tokens in the vocabulary, at least 1")
    student.check("student", v_eff)
    rows = len(student.hidden)
    if labels.dtype != torch.int64 or labels.shape != (rows,):
        raise ValueError(f"labels must be int64 of shape [{rows}], one per student hidden state, not {labels.dtype} {tuple(labels.shape)}")
    if teacher is None and settings.hard_weight != 1:
        raise ValueError(
            f"hard_weight={settings.hard_weight} needs a teacher and there is none; give one, or set hard_weight to 1.0 to train only on "
            "the labels"
        )
    _check_teacher(teacher, rows, settings, v_eff)
    # found before anything is computed, so that masked rows cost no product
    kept = (labels != MASKED).nonzero().squeeze(1)
    _check_labels(labels[kept], v_eff)
    # waits for the device, once per call
    impossible = any(_holds_minus_infinity(model, v_eff) for model in (student, teacher))
    return Problem(student, _without_graph(teacher), labels, settings, v_eff, kept, impossible)


@torch.no_grad()
def _holds_minus_infinity(model: HiddenStates | TeacherLogitsSource | None, v_eff: int) -> bool:
    if isinstance(model, TeacherLogits):
        logits = model.logits[:, :v_eff]
        # amin needs no [N, V] mask, which isneginf would make
        return logits.numel() > 0 and float(logits.amin()) == -torch.inf
    # products of finite hidden states and heads are finite, so only a bias makes a token impossible
    bias = model.bias if isinstance(model, HiddenStates) else None
    return bias is not None and bool(torch.isneginf(bias[:v_eff]).any())


def _check_teacher(teacher: TeacherLogitsSource | None, rows: int, settings: LossSettings, v_eff: int) -> None:
    if isinstance(teacher, SparseTargets):
        teacher.check(rows, v_eff)
        if settings.hard_weight < 1 and settings.divergence != "forward_kl":
            raise ValueError(
                f"divergence={settings.divergence} needs the whole distribution of the teacher; with sparse targets use forward_kl"
            )
        # the stored probabilities cannot be turned into those of another temperature, which depend on all logits
        if settings.temperature not in (None, teacher.temperature):
            raise ValueError(
                f"temperature={settings.temperature} differs from that of the sparse targets; set temperature to {teacher.temperature}"
            )
        return
    if isinstance(teacher, TeacherHidden):
        teacher.check("teacher", v_eff)
    elif teacher is not None:
        teacher.check(v_eff)
    values = None if teacher is None else teacher.hidden if isinstance(teacher, TeacherHidden) else teacher.logits
    if values is not None and len(values) != rows:
        raise ValueError(f"the teacher covers {len(values)} positions and the student {rows}; both must see the same tokens")


def _without_graph(teacher: TeacherLogitsSource | None) -> HiddenStates | TeacherLogits | SparseTargets | None:
    if isinstance(teacher, SparseTargets):
        return teacher
    if isinstance(teacher, TeacherHidden):
        # the teacher is a constant: its graph would only keep activations in memory
        return teacher.detached()
    return None if teacher is None else TeacherLogits(teacher.logits.detach())


def _check_labels(labels: Tensor, v_eff: int) -> None:
    """Labels out of range would read foreign memory on a GPU or fail in a kernel's assertion that does not name the label."""
    wrong = labels[(labels < 0) | (labels >= v_eff)]
    if len(wrong):
        raise ValueError(
            f"label {int(wrong[0])} is not a token of the vocabulary (0 to {v_eff - 1}); mask positions without a label with {MASKED}"
        )
