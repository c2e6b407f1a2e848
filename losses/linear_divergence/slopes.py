"""Value and gradient of every divergence for a block of rows, in place.

With p = softmax(z_t / T), q = softmax(z_s / T), d = log p - log q and E = expm1(d), T times the gradient with respect to the student's
logits z_s is q (g - sum_v q g), where g is the derivative with respect to log q, divided by q, up to a constant:

    forward KL         (q - p is the whole slope)
    reverse KL         g = -d
    JSD                g = -u / beta,                      u = log(m / q) = log1p(beta E)
    skew forward KL    g = -(1 - alpha)^2 E / (1 + alpha E)
    skew reverse KL    g = -u - alpha expm1(-u),           u = log1p((1 - alpha) E)
    total variation    g = sign(q - p) / 2

(definitions in ``divergences`` and ``mixtures``; the JSD is the one divided by beta (1 - beta)). Each g is 0 where p = q, so that no
numbers of the size of 1 are subtracted from each other when the models nearly agree.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..divergences import forward_weight
from ..logits import FLOOR
from ..mixtures import MAX_LOG_RATIO
from ..settings import Divergence, LossSettings


@dataclass(frozen=True, eq=False)
class Pair:
    """Two distributions over V in three buffers [n, V]: p, log q and d = log p - log q."""

    p: Tensor
    log_q: Tensor
    d: Tensor


Result = tuple[Tensor, Tensor | None]
"""(divergence [n], T times its gradient [n, V] or None)."""


def soft(pair: Pair, spare: Tensor, settings: LossSettings, *, gradient: bool) -> Result:
    """The divergence that ``settings`` names, without the factor T^2, and T times its gradient.

    Args:
        pair: Overwritten; ``log_q`` becomes q if q or a gradient is needed.
        spare: [n, V] scratch.
        settings: Divergence and its parameter.
        gradient: Whether to compute the gradient; it is in one of the buffers.
    """
    return _SLOPES[settings.divergence](pair, spare, settings, gradient)


def infinite(d: Tensor, divergence: Divergence) -> Tensor:
    """[n] whether a row's divergence is infinite (see ``divergences``), from d [n, V] of logarithms that are at least ``FLOOR``."""
    # |d| above |FLOOR| / 2 means that exactly one of the two probabilities is 0
    student_alone = d.amin(-1) <= FLOOR / 2
    teacher_alone = d.amax(-1) >= -FLOOR / 2
    return {
        "forward_kl": teacher_alone,
        "reverse_kl": student_alone,
        "symmetric_kl": teacher_alone | student_alone,
        "adaptive_kl": teacher_alone | student_alone,
    }.get(divergence, torch.zeros_like(student_alone))


def _forward_kl(pair: Pair, spare: Tensor, settings: LossSettings, gradient: bool) -> Result:
    value = torch.linalg.vecdot(pair.p, pair.d)
    # q only where it is needed: exp_ is a whole pass over [n, V]
    return value, torch.sub(pair.log_q.exp_(), pair.p, out=pair.p) if gradient else None


def _reverse_kl(pair: Pair, spare: Tensor, settings: LossSettings, gradient: bool) -> Result:
    q = pair.log_q.exp_()
    value = -torch.linalg.vecdot(q, pair.d)
    # q (g - sum q g) with g = -d: sum q g is the value itself
    return value, pair.d.add_(value.unsqueeze(1)).mul_(q).neg_() if gradient else None


def _symmetric_kl(pair: Pair, spare: Tensor, settings: LossSettings, gradient: bool) -> Result:
    assert settings.balance is not None
    return _both_kls(pair, pair.log_q.exp_(), pair.p.new_full((len(pair.p),), settings.balance), gradient)


def _adaptive_kl(pair: Pair, spare: Tensor, settings: LossSettings, gradient: bool) -> Result:
    assert settings.head_mass is not None
    q = pair.log_q.exp_()
    # a constant: no gradient flows through |p - q|
    weight = forward_weight(pair.p, torch.sub(pair.p, q, out=spare).abs_(), settings.head_mass)
    return _both_kls(pair, q, weight, gradient)


def _both_kls(pair: Pair, q: Tensor, weight: Tensor, gradient: bool) -> Result:
    """``weight`` [n] times forward KL plus (1 - ``weight``) times reverse KL."""
    p, d = pair.p, pair.d
    reverse = -torch.linalg.vecdot(q, d)
    value = weight * torch.linalg.vecdot(p, d) + (1 - weight) * reverse
    if not gradient:
        return value, None
    forward = weight.unsqueeze(1)
    # in p's buffer, which is not needed any more; q still is
    slope = torch.sub(q, p, out=p).mul_(forward)
    # minus (1 - weight) q (d + reverse KL), the centred slope of reverse KL
    return value, slope.sub_(d.add_(reverse.unsqueeze(1)).mul_(q).mul_(1 - forward))


def _jsd(pair: Pair, spare: Tensor, settings: LossSettings, gradient: bool) -> Result:
    assert settings.beta is not None
    beta, p, q = settings.beta, pair.p, pair.log_q.exp_()
    # only mixtures are clamped: reverse KL of two models 800 nats apart was 90 % off with a clamp (docs/lab-book.md, 2026-11-24)
    d = pair.d.clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    # log of m / q = 1 + beta E, and of m / p with the roles of p and q exchanged, in the buffer of d
    log_m_over_q = torch.expm1(d, out=spare).mul_(beta).log1p_()
    log_m_over_p = d.neg_().expm1_().mul_(1 - beta).log1p_()
    value = -torch.linalg.vecdot(p, log_m_over_p) / (1 - beta) - torch.linalg.vecdot(q, log_m_over_q) / beta
    return value, _centred(log_m_over_q.div_(-beta), q) if gradient else None


def _gkd_jsd(pair: Pair, spare: Tensor, settings: LossSettings, gradient: bool) -> Result:
    assert settings.beta is not None
    value, slope = _jsd(pair, spare, settings, gradient)
    # the published form is ``_jsd`` times beta (1 - beta), and so is its gradient
    factor = settings.beta * (1 - settings.beta)
    return value * factor, None if slope is None else slope.mul_(factor)


def _skew_forward_kl(pair: Pair, spare: Tensor, settings: LossSettings, gradient: bool) -> Result:
    assert settings.alpha is not None
    alpha, d = settings.alpha, pair.d.clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_m_over_p = torch.neg(d, out=spare).expm1_().mul_(1 - alpha).log1p_()
    value = -torch.linalg.vecdot(pair.p, log_m_over_p)
    if not gradient:
        return value, None
    # 1 + alpha E is the mixture divided by q
    ratio = d.expm1_()
    mixture = torch.mul(ratio, alpha, out=spare).add_(1)
    return value, _centred(ratio.div_(mixture).mul_(-((1 - alpha) ** 2)), pair.log_q.exp_())


def _skew_reverse_kl(pair: Pair, spare: Tensor, settings: LossSettings, gradient: bool) -> Result:
    assert settings.alpha is not None
    alpha, q = settings.alpha, pair.log_q.exp_()
    minus_u = pair.d.clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO).expm1_().mul_(1 - alpha).log1p_().neg_()
    value = torch.linalg.vecdot(q, minus_u)
    if not gradient:
        return value, None
    return value, _centred(torch.expm1(minus_u, out=spare).mul_(-alpha).add_(minus_u), q)


def _total_variation(pair: Pair, spare: Tensor, settings: LossSettings, gradient: bool) -> Result:
    q = pair.log_q.exp_()
    # its sign is 0 where p = q, and so is g
    difference = torch.sub(q, pair.p, out=spare)
    value = torch.linalg.vector_norm(difference, 1, dim=1) / 2
    return value, _centred(difference.sign_().mul_(0.5), q) if gradient else None


def _centred(g: Tensor, q: Tensor) -> Tensor:
    """q (g - sum_v q g), in the buffer of g."""
    return g.sub_(torch.linalg.vecdot(q, g).unsqueeze(1)).mul_(q)


_SLOPES: Mapping[Divergence, Callable[[Pair, Tensor, LossSettings, bool], Result]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "gkd_jsd": _gkd_jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "adaptive_kl": _adaptive_kl,
    "symmetric_kl": _symmetric_kl,
    "total_variation": _total_variation,
}
