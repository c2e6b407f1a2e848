"""Divergences that compare with a mixture of both models, one number per token; conventions as in ``divergences``.

    GKD's JSD          beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q     (Agarwal et al. 2023, arXiv 2306.13649)
    JSD                the same divided by beta (1 - beta)
    skew forward KL    KL(p || alpha p + (1 - alpha) q)                                         (Ko et al. 2024, arXiv 2402.03898)
    skew reverse KL    KL(q || (1 - alpha) p + alpha q)

The published JSD vanishes as beta approaches 0 or 1; divided by beta (1 - beta) it approaches forward KL at 0 and reverse KL at 1. With
d = log p - log q, log(m / q) is computed as log1p(weight of p * expm1(d)): a difference of logarithms would lose the digits that matter
when the two models nearly agree.
"""

import torch
from torch import Tensor

from .logits import checked_share, log_distributions

MAX_LOG_RATIO = 80.0
"""Bound on |log p - log q| inside exponentials. exp(80) fits fp32; a larger ratio has a weight below exp(-80) = 2e-35."""


def jsd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence per token, divided by beta (1 - beta).

    Args:
        student_logits: [..., V], as for ``forward_kl``; gradients flow into both arguments.
        teacher_logits: [..., V].
        temperature: T > 0, divides both logits.
        beta: Weight of the teacher in the mixture, strictly between 0 (forward KL) and 1 (reverse KL).

    Returns:
        [...], as for ``forward_kl``.

    Raises:
        ValueError: shapes differ, temperature is not positive, or beta is not strictly between 0 and 1.
    """
    checked_share("beta", beta, "use forward_kl or reverse_kl for 0 and 1")
    log_q, log_p = log_distributions(student_logits, teacher_logits, temperature)
    d = _log_ratio(log_p, log_q)
    # sum p log(m / p) and sum q log(m / q), the negative KLs to the mixture m = beta p + (1 - beta) q: [...]
    from_teacher = (log_p.exp() * _log_mixture(-d, 1 - beta)).sum(-1)
    from_student = (log_q.exp() * _log_mixture(d, beta)).sum(-1)
    return -from_teacher / (1 - beta) - from_student / beta


def gkd_jsd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence per token as published: ``jsd`` times beta (1 - beta).

    Arguments, result and errors as for ``jsd``. For beta near 0 or 1 the value and its gradient are nearly 0: prefer ``jsd``.
    """
    return beta * (1 - beta) * jsd(student_logits, teacher_logits, temperature=temperature, beta=beta)


def skew_forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, alpha: float = 0.1) -> Tensor:
    """KL(teacher || alpha teacher + (1 - alpha) student) per token: forward KL with bounded gradients, at most log(1 / alpha).

    Arguments, result and errors as for ``jsd``; ``alpha`` lies strictly between 0 and 1.
    """
    checked_share("alpha", alpha, "use forward_kl for 0")
    log_q, log_p = log_distributions(student_logits, teacher_logits, temperature)
    return -(log_p.exp() * _log_mixture(-_log_ratio(log_p, log_q), 1 - alpha)).sum(-1)


def skew_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, alpha: float = 0.1) -> Tensor:
    """KL(student || (1 - alpha) teacher + alpha student) per token: reverse KL, at most log(1 / alpha).

    Arguments, result and errors as for ``jsd``; ``alpha`` lies strictly between 0 and 1.
    """
    checked_share("alpha", alpha, "use reverse_kl for 0")
    log_q, log_p = log_distributions(student_logits, teacher_logits, temperature)
    return -(log_q.exp() * _log_mixture(_log_ratio(log_p, log_q), 1 - alpha)).sum(-1)


def _log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p - log_q).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _log_mixture(log_ratio: Tensor, share: float) -> Tensor:
    """log((share a + (1 - share) b) / b) for log_ratio = log a - log b."""
    return torch.log1p(share * torch.expm1(log_ratio))
