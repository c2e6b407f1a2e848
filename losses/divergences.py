"""Divergences between the next-token distributions of two models, one number per token.

With p = softmax(teacher_logits / T), q = softmax(student_logits / T), over a vocabulary of V tokens:

    forward KL        KL(p || q) = sum_v p_v (log p_v - log q_v)                    (Hinton et al. 2015, arXiv 1503.02531)
    reverse KL        KL(q || p) = sum_v q_v (log q_v - log p_v)                    (Gu et al. 2023, arXiv 2306.08543)
    symmetric KL      balance KL(p || q) + (1 - balance) KL(q || p)
    adaptive KL       (g_h KL(p || q) + g_t KL(q || p)) / (g_h + g_t),  g = sum |p - q| over head and tail
                                                                                    (Wu et al. 2024, arXiv 2404.02657, eq. 11-13)
    total variation   sum_v |p_v - q_v| / 2                                         (Wen et al. 2023, arXiv 2307.15190)

``mixtures.py`` has the divergences that compare with a mixture of p and q. ``torch.nn.functional.kl_div`` takes its arguments in the
opposite order; here the name gives the direction and the student always comes first. Every function sums over V, in nats, without the
factor T^2, and leaves the mean over tokens to the caller, who knows their number. fp64 inputs are computed in fp64, all others in fp32.

A logit of -inf is a probability of 0, and 0 log 0 is 0. So a token to which neither model gives any probability adds nothing, and forward
KL, total variation and all mixtures accept a teacher that gives some tokens probability 0. Forward KL is inf where only the student's
probability is 0, reverse KL where only the teacher's is; symmetric and adaptive KL are inf in either case. Logits of NaN or +inf give
NaN.

Both KLs are summed as

    KL(a || b) = sum_v a_v (exp(t_v) - 1 - t_v),   t = log b - log a

which equals the sum of -a t because both distributions sum to 1. No terms cancel in it: in fp32 it is accurate from about 1e-11 nats,
while the sum of -a t has rounding noise of 1e-7.
"""

import torch
from torch import Tensor

from .logits import FLOOR, checked_share, checked_temperature, in_full_precision, log_distributions


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) per token: the student must give probability to every token that the teacher finds likely.

    Args:
        student_logits: [..., V], any floating dtype. Gradients flow into both arguments.
        teacher_logits: [..., V], the same vocabulary in the same order.
        temperature: T > 0, divides both logits.

    Returns:
        [...], fp32 (fp64 if either argument is fp64), sum over V in nats.

    Raises:
        ValueError: shapes differ, or temperature is not positive.
    """
    log_q, log_p = log_distributions(student_logits, teacher_logits, temperature)
    return _kl(log_p, log_q)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) per token: the student must avoid every token that the teacher finds unlikely.

    Arguments, result and errors as for ``forward_kl``.
    """
    log_q, log_p = log_distributions(student_logits, teacher_logits, temperature)
    return _kl(log_q, log_p)


def symmetric_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, balance: float = 0.5) -> Tensor:
    """``balance`` x forward KL + (1 - ``balance``) x reverse KL per token; 0.5 is half of Jeffreys' divergence.

    Arguments, result and errors as for ``forward_kl``; ``balance`` is strictly between 0 and 1.
    """
    checked_share("balance", balance, "use forward_kl for 1 and reverse_kl for 0")
    log_q, log_p = log_distributions(student_logits, teacher_logits, temperature)
    return balance * _kl(log_p, log_q) + (1 - balance) * _kl(log_q, log_p)


def adaptive_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, head_mass: float = 0.5) -> Tensor:
    """Forward and reverse KL per token, weighted by the distance between the models on the teacher's head and on its tail.

    The weights are constants to autograd. Where the models are equal both are 1/2.

    Args:
        student_logits: [..., V], as for ``forward_kl``; gradients flow only into this argument.
        teacher_logits: [..., V].
        temperature: T > 0, divides both logits.
        head_mass: Teacher probability that makes up the head, strictly between 0 and 1; see ``head_threshold``.

    Returns:
        [...], as for ``forward_kl``.

    Raises:
        ValueError: shapes differ, temperature is not positive, or head_mass is not strictly between 0 and 1.
    """
    checked_share("head_mass", head_mass, "use forward_kl or reverse_kl for 0 and 1")
    log_q, log_p = log_distributions(student_logits, teacher_logits.detach(), temperature)
    p, q = log_p.exp(), log_q.exp()
    # [...]; detached above, so gradients flow through the two KLs alone
    weight = forward_weight(p, (p - q).detach().abs(), head_mass)
    return weight * _kl(log_p, log_q) + (1 - weight) * _kl(log_q, log_p)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) [...] from logarithms [..., V] of at least ``FLOOR``; terms are b - a - a t where exp(t) could overflow."""
    a, t = log_a.exp(), log_b - log_a
    # expm1 of the clamped t: torch.where computes both branches, and exp of a large t would give the unused one inf and its gradient NaN
    small = t.clamp(-1, 1)
    value = torch.where(t == small, a * (torch.expm1(small) - small), log_b.exp() - a - a * t).sum(-1)
    # FLOOR is finite, so the sum is huge, not inf, where b is 0 and a is not
    impossible = ((log_b <= FLOOR) & (log_a > FLOOR)).any(-1)
    return value.masked_fill(impossible, torch.inf)


def head_threshold(p: Tensor, head_mass: float) -> Tensor:
    """Smallest probability in the head.

    The head contains every token whose likelier tokens have less than ``head_mass`` together, and all tokens as likely as the last of them.

    Args:
        p: [..., V] probabilities.
        head_mass: In (0, 1).

    Returns:
        [..., 1], dtype of ``p``: the head is where ``p`` is at least this.
    """
    ordered = p.sort(-1, descending=True).values
    # [..., V]: the mass of all likelier tokens
    before = ordered.cumsum(-1) - ordered
    # clamped for NaN, of which no token is "before": index -1 would be an error where the result must be NaN
    count = (before < head_mass).sum(-1, keepdim=True).clamp(min=1)
    return ordered.gather(-1, count - 1)


def forward_weight(p: Tensor, distance: Tensor, head_mass: float) -> Tensor:
    """g_h / (g_h + g_t) of ``adaptive_kl`` [...], from p [..., V] and |p - q| [..., V]; 1/2 where the two are equal."""
    whole = distance.sum(-1)
    # g_h; ``whole`` is g_h + g_t
    head = (distance * (p >= head_threshold(p, head_mass))).sum(-1)
    # clamped because torch.where also computes the quotient that it drops
    return torch.where(whole > 0, head / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0.5)


def total_variation(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Half the sum of |p - q| per token: the probability that the best coupling of both models draws different tokens, in [0, 1].

    Arguments, result and errors as for ``forward_kl``. Where p = q the gradient is 0.
    """
    log_q, log_p = log_distributions(student_logits, teacher_logits, temperature)
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(student_logits)[label] per token, always at temperature 1.

    Args:
        student_logits: [..., V], any floating dtype.
        labels: [...] int64 in [0, V).

    Returns:
        [...], fp32 (fp64 for fp64), in nats.
    """
    return -torch.log_softmax(in_full_precision(student_logits), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def teacher_entropy(teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """-sum_v p_v log p_v per token: the least possible cross-entropy against the teacher's soft targets.

    Args:
        teacher_logits: [..., V], any floating dtype; -inf = a probability of 0.
        temperature: T > 0.

    Returns:
        [...], fp32 (fp64 for fp64), in nats.

    Raises:
        ValueError: temperature is not positive.
    """
    log_p = torch.log_softmax(in_full_precision(teacher_logits) / checked_temperature(temperature), -1).clamp(min=FLOOR)
    # a probability of 0 adds exp(FLOOR) * FLOOR = 0, where log 0 would add NaN
    return -(log_p.exp() * log_p).sum(-1)
