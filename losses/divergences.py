"""Divergences between the next-token distributions of two models, one number per token.

With p = softmax(teacher_logits / T), q = softmax(student_logits / T), over a vocabulary of V tokens:

    forward KL   KL(p || q) = sum_v p_v (log p_v - log q_v)                        (Hinton et al. 2015, arXiv 1503.02531)
    reverse KL   KL(q || p) = sum_v q_v (log q_v - log p_v)                        (Gu et al. 2023, arXiv 2306.08543)
    JSD          (beta KL(p || m) + (1 - beta) KL(q || m)) / (beta (1 - beta)),    m = beta p + (1 - beta) q
                                                                                   (Agarwal et al. 2023, arXiv 2306.13649, eq. 1)

The published JSD vanishes at both ends of beta; divided by beta (1 - beta) it runs into forward KL at 0 and reverse KL at 1.
``torch.nn.functional.kl_div`` takes its arguments the other way round; here a name says the direction and the student comes first.
Every function sums over V, in nats, unscaled by T^2, and leaves the mean over tokens to whoever knows how many there are. Logits are
finite; fp64 is computed in fp64, everything else in fp32. Gradients flow into both arguments.
"""

import torch
from torch import Tensor

from .settings import LossSettings

MAX_LOG_RATIO = 80.0
"""Bound on |log p - log q| inside exponentials of jsd. exp(80) fits fp32; beyond it the ratio's own weight is below exp(-80) = 2e-35."""


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) per token: the student must cover whatever the teacher finds likely.

    Args:
        student_logits: [..., V], any floating dtype, finite.
        teacher_logits: [..., V], the same vocabulary in the same order.
        temperature: T > 0, divides both logits.

    Returns:
        [...], fp32 (fp64 if either argument is fp64), sum over V in nats.

    Raises:
        ValueError: shapes differ, or temperature is not positive.
    """
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) per token: the student must avoid whatever the teacher finds unlikely.

    Arguments, result and errors as for ``forward_kl``.
    """
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jsd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence per token, divided by beta (1 - beta).

    log(m / q) is written log1p(beta expm1(log p - log q)): a difference of logarithms would lose the digits that matter when the two
    models nearly agree, and more of them the smaller beta is.

    Args:
        student_logits: [..., V], as for ``forward_kl``.
        teacher_logits: [..., V].
        temperature: T > 0, divides both logits.
        beta: Weight of the teacher in the mixture, strictly between 0 (forward KL) and 1 (reverse KL).

    Returns:
        [...], as for ``forward_kl``.

    Raises:
        ValueError: shapes differ, temperature is not positive, or beta is not strictly between 0 and 1.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta={beta} must lie strictly between 0 and 1; use forward_kl or reverse_kl for the ends")
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature)
    log_ratio = (log_p - log_q).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_m_over_q = torch.log1p(beta * torch.expm1(log_ratio))
    log_m_over_p = torch.log1p((1 - beta) * torch.expm1(-log_ratio))
    return -(log_p.exp() * log_m_over_p).sum(-1) / (1 - beta) - (log_q.exp() * log_m_over_q).sum(-1) / beta


def cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(student_logits)[label] per token; the temperature never applies to it.

    Args:
        student_logits: [..., V], any floating dtype.
        labels: [...] int64 in [0, V).

    Returns:
        [...], fp32 (fp64 for fp64), in nats.
    """
    return -torch.log_softmax(in_full_precision(student_logits), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def teacher_entropy(teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """-sum_v p_v log p_v per token: the floor of cross-entropy against the teacher's soft targets.

    Args:
        teacher_logits: [..., V], any floating dtype, finite.
        temperature: T > 0.

    Returns:
        [...], fp32 (fp64 for fp64), in nats.

    Raises:
        ValueError: temperature is not positive.
    """
    log_p = torch.log_softmax(in_full_precision(teacher_logits) / _checked(temperature), -1)
    return -(log_p.exp() * log_p).sum(-1)


def chosen_divergence(student_logits: Tensor, teacher_logits: Tensor, settings: LossSettings) -> Tensor:
    """The divergence that ``settings`` names, at its temperature, per token; unscaled by T^2."""
    if settings.divergence == "forward_kl":
        return forward_kl(student_logits, teacher_logits, temperature=settings.temperature)
    if settings.divergence == "reverse_kl":
        return reverse_kl(student_logits, teacher_logits, temperature=settings.temperature)
    return jsd(student_logits, teacher_logits, temperature=settings.temperature, beta=settings.beta)


def in_full_precision(tensor: Tensor) -> Tensor:
    """fp64 as it is, any other dtype as fp32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _log_distributions(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits of shape {tuple(student_logits.shape)} and teacher logits of shape {tuple(teacher_logits.shape)} must be "
            "equal in shape; slice both to the real vocabulary when one is padded"
        )
    _checked(temperature)
    student, teacher = in_full_precision(student_logits), in_full_precision(teacher_logits)
    return torch.log_softmax(student / temperature, -1), torch.log_softmax(teacher / temperature, -1)


def _checked(temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be greater than 0; 1.0 leaves the logits as they are")
    return temperature
