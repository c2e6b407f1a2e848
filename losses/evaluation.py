"""Per-token figures of a model on text, and against a teacher: the parts of perplexity, KL, top-1 agreement and calibration."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .divergences import forward_kl
from .logits import in_full_precision


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationSums:
    """One number per token, [N]. The caller collects them over all batches: percentiles and calibration need every token."""

    nll: Tensor
    """Negative log-likelihood of the label in nats, over all logits; fp32 (fp64 for fp64)."""
    confidence: Tensor
    """Probability of the likeliest token, dtype as ``nll``."""
    correct: Tensor
    """Whether the likeliest token is the label, bool."""
    kl: Tensor | None
    """KL(teacher || student) in nats over the teacher's vocabulary, accurate from about 1e-11 in fp32. It is inf where the student gives
    probability 0 to a token that the teacher can produce. None without a teacher."""
    top1: Tensor | None
    """Whether student and teacher have the same likeliest token in the teacher's vocabulary, bool; None without a teacher."""


@torch.no_grad()
def evaluation_sums(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> EvaluationSums:
    """Computes the figures of each token.

    Figures on the text (``nll``, ``confidence``, ``correct``) use all logits of the student, padding included, as serving runtimes do.
    Figures against the teacher use the teacher's columns only, so pass teacher logits that are cut to the real vocabulary.

    Args:
        student_logits: [N, V_s], any floating dtype.
        teacher_logits: [N, V] with V <= V_s; the first V tokens of both are the same. None = no teacher.
        labels: [N] int64 in [0, V_s), without masked positions.

    Returns:
        Tensors [N] without an autograd graph.

    Raises:
        ValueError: shapes do not fit, or a label is masked or out of range.
    """
    _check(student_logits, teacher_logits, labels)
    # law 2, docs/architecture.md: fp32 softmax over all V_s columns, as runtimes compute perplexity
    logits = in_full_precision(student_logits)
    log_q = torch.log_softmax(logits, -1)
    likeliest = logits.argmax(-1)
    kl = top1 = None
    if teacher_logits is not None:
        # [N, V]: both softmaxes are over the teacher's vocabulary, so the student's padding takes no mass
        shared = logits[:, : teacher_logits.shape[1]]
        kl = forward_kl(shared, teacher_logits)
        top1 = shared.argmax(-1) == teacher_logits.argmax(-1)
    return EvaluationSums(
        nll=-_at(log_q, labels),
        confidence=_at(log_q, likeliest).exp(),
        correct=likeliest == labels,
        kl=kl,
        top1=top1,
    )


def _at(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.gather(-1, columns.unsqueeze(-1)).squeeze(-1)


def _check(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> None:
    if student_logits.ndim != 2 or labels.shape != student_logits.shape[:1]:
        raise ValueError(
            f"student logits of shape {tuple(student_logits.shape)} and labels of shape {tuple(labels.shape)} must be [N, V] and [N]; "
            "shift and flatten both with shift_for_next_token"
        )
    if teacher_logits is not None and (
        teacher_logits.ndim != 2 or len(teacher_logits) != len(labels) or teacher_logits.shape[1] > student_logits.shape[1]
    ):
        raise ValueError(
            f"teacher logits of shape {tuple(teacher_logits.shape)} must be [{len(labels)}, V] with V at most the student's "
            f"{student_logits.shape[1]}; cut them to the real vocabulary"
        )
    if len(labels) and bool(((labels < 0) | (labels >= student_logits.shape[1])).any()):
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but 0 to {student_logits.shape[1] - 1} are allowed; "
            "leave masked positions out before evaluating"
        )
