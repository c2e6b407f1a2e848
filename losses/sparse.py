"""Forward KL to a teacher of whom a few probabilities per token are known: what caches and served teachers give.

With S the known tokens, w their weights, log q the student's log-probabilities with the full normaliser:

    bucket     sum_S w (log w - log q) + w_t (log w_t - log q_t),   w_t, q_t = mass of all other tokens
    sampled    -sum_S w log q - H,                                  H = the teacher's entropy

The bucket form compares V outcomes as |S| + 1: a lower bound of KL(teacher || student), and it keeps the student's mass in the tail
where the teacher has it. q_t is a sum over the other tokens, never 1 minus a sum, which is noise once S holds nearly everything.
The sampled form, with tokens drawn from the teacher and w = counts / draws, is an unbiased estimate of the KL, and so is its
gradient (Anshumann et al. 2025, arXiv 2503.16870); top tokens that are kept exactly beside samples of the rest are a case of it.

Where it is known with which probability r_v each token of S was drawn (1 = for certain), the gradient has less noise as that of

    controlled  -sum_S (w - x) log q - H,       x = c q / r, a constant to autograd

sum_S (q / r) grad log q is 0 on average, as sum_V grad q is, so for any c that does not depend on the draws the gradient stays
unbiased; but its error goes with that of the first sum, and its noise falls from (1 - r) w^2 to (1 - r) (w - c q / r)^2 a token: to
nothing as the student reaches the teacher (a difference estimator: Saerndal, Swensson & Wretman 1992, section 6.3). Where q is large
and r tiny it would grow without bound instead: ``control`` says what c and x are, and has the bound. The value is the sampled form's.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .logits import checked_temperature, in_full_precision


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """What is known of a teacher's distribution at N positions."""

    ids: Tensor
    """[N, K] int64 in [0, V), distinct among those in use."""
    log_weights: Tensor
    """[N, K] fp32 natural logarithms; -inf = the slot is not in use. A row has at least one that is."""
    entropy: Tensor
    """[N] fp32 entropy of the teacher's whole distribution in nats."""
    best: Tensor
    """[N] int64 the teacher's likeliest token."""
    log_tail: Tensor | None = None
    """[N] fp32 log of the mass outside ``ids`` (bucket form; -inf where there is none); None = sampled form."""
    temperature: float = 1.0
    """Temperature of the distribution."""
    covered: Tensor | None = None
    """[N] fp32 mass that is known exactly, in [0, 1]; None = the sum of the weights."""
    log_inclusion: Tensor | None = None
    """[N, K] fp32 log of the probability with which each token was drawn, at most 0, 0 = for certain; None = not known."""

    def check(self, rows: int, v_eff: int) -> None:
        """Raise ValueError, saying what is wrong, unless the parts fit each other, ``rows`` positions and ``v_eff`` tokens."""
        ids, weights = self.ids, self.log_weights
        if ids.ndim != 2 or ids.dtype != torch.int64 or weights.shape != ids.shape or ids.shape[1] < 1:
            raise ValueError(
                f"sparse targets need ids [N, K] int64 and log_weights [N, K] with K at least 1, not {tuple(ids.shape)} {ids.dtype} and "
                f"{tuple(weights.shape)}"
            )
        if self.log_inclusion is not None and (self.log_inclusion.shape != ids.shape or self.log_tail is not None):
            raise ValueError("log_inclusion of sparse targets goes with the sampled form, one number for each of ids")
        others = {"entropy": self.entropy, "best": self.best, "log_tail": self.log_tail, "covered": self.covered}
        if wrong := [name for name, part in others.items() if part is not None and part.shape != ids.shape[:1]]:
            raise ValueError(f"{wrong[0]} of sparse targets must have shape [{len(ids)}], one number per position")
        if len(ids) != rows:
            raise ValueError(f"the teacher covers {len(ids)} positions and the student {rows}; both must see the same tokens")
        used = ids[weights > -torch.inf]
        if used.numel() and not (int(used.min()) >= 0 and int(used.max()) < v_eff):
            raise ValueError(f"sparse targets name tokens {int(used.min())} to {int(used.max())}, the vocabulary is 0 to {v_eff - 1}")

    def __getitem__(self, rows: Tensor | slice) -> "SparseTargets":
        """Some positions."""
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in [name for name, part in parts.items() if isinstance(part, Tensor)]:
            parts[name] = parts[name][rows]
        return SparseTargets(**parts)

    def covered_mass(self) -> Tensor:
        """[N] mass of the teacher's distribution that is known exactly."""
        return self.log_weights.exp().sum(1).clamp(max=1) if self.covered is None else self.covered

    def filled(self) -> tuple[Tensor, Tensor]:
        """(ids, weights) [N, K] with slots that are not in use given a used id of their row and weight 0, so that they count nowhere."""
        used = self.log_weights > -torch.inf
        first = self.ids.gather(1, used.to(torch.int8).argmax(1, keepdim=True))
        return torch.where(used, self.ids, first), self.log_weights.exp()

    def negative_entropy(self) -> Tensor:
        """[N] what the student has no part in: sum w log w of the outcomes compared, or -H."""
        if self.log_tail is None:
            return -self.entropy
        parts = torch.cat([self.log_weights, self.log_tail.unsqueeze(1)], 1)
        return torch.special.entr(parts.exp()).sum(1).neg()


MOST_CONTROL = 4.0
"""Of a drawn token's weight: what x of the controlled form is at most."""


def control(log_q: Tensor, weights: Tensor, log_inclusion: Tensor) -> Tensor:
    """x of the controlled form [N, K], a constant to autograd; 0 in slots that are not in use.

    Noise is c q / r - w = w (c q / p - 1) a drawn token. Over the tail the best c is mean (q / p) / mean (q / p)^2, weighted by p. A
    row knows p = w r of its draws alone, so each draw v gets its c from the others (leave one out):

        c_v = min(1, P / Q) exp(-mean over the other draws of log^2 (q P / (p Q)))

    with P and Q what teacher and student leave for the tokens not known for certain; P is the drawn weights, whose number is fixed. Where
    log (q / p) is normal of variance s^2, exp(-s^2 - s^4 / 4) stands where exp(-s^2) is best. A draw alone in its row gets none. With c
    from all draws, which is that of the tokens not drawn,

        x_v = min(c_v q / r - (c_v - c) q, 4 w)     drawn at random
        x_v = c q                                   known for certain

    The bound. A row may have drawn nothing of where p is tiny and q is not: no c from the row sees that, and the noise of an unbiased
    estimate is q^2 / r there. Cut at 4 w, a token's slope x - w stays within 3 w and its noise within nine times the plain one's, whatever
    the student is. It was not measured above the plain one's (docs/lab-book.md).

    The bias. That of the cut is c q - 4 p in expectation where c q > 4 p, so there is none while no token of the tail has more than
    four times the teacher's probability. Such a token is still pushed down, by (1 - c) q + 3 p instead of q - p, and the expected
    gradient is 0 only where q = p: with d_v >= 0 what is cut, q_v (1 + sum d) = p_v + d_v there, and d_v > 0 would need
    q_v sum d <= -3 p_v. Beside it the draws of a row exclude each other a little, so that c_v depends on whether v was drawn: some
    hundredths of the gradient, of either sign, which cancel over positions.

    Args:
        log_q: [N, K] log-probabilities of the student.
        weights: [N, K], 0 where a slot is not in use.
        log_inclusion: [N, K].
    """
    log_q, used = log_q.detach(), weights > 0
    drawn = used & (log_inclusion < 0)
    q, least = torch.where(used, log_q.exp(), 0.0), torch.finfo(log_q.dtype).eps
    rest = torch.where(drawn, weights, 0.0).sum(1, keepdim=True).clamp(min=least)
    left = (1 - torch.where(drawn, 0.0, q).sum(1, keepdim=True)).clamp(min=least)
    log_p = weights.clamp(min=torch.finfo(weights.dtype).tiny).log() + log_inclusion
    apart = torch.where(drawn, log_q - log_p - (left / rest).log(), 0.0).square()
    count, whole = drawn.sum(1, keepdim=True), apart.sum(1, keepdim=True)
    most = torch.where(count > 1, (rest / left).clamp(max=1), 0.0)
    own = most * torch.exp(-(whole - apart) / (count - 1).clamp(min=1))
    common = most * torch.exp(-whole / count.clamp(min=1))
    at_random = own * (log_q - log_inclusion).exp() - (own - common) * q
    return torch.where(drawn, torch.minimum(at_random, MOST_CONTROL * weights), common * q)


def sparse_forward_kl(student_logits: Tensor, targets: SparseTargets) -> Tensor:
    """Bucket or sampled forward KL per token, at the temperature of ``targets``; gradients flow into the logits.

    Args:
        student_logits: [N, V], any floating dtype, finite.
        targets: N positions.

    Returns:
        [N], fp32 (fp64 for fp64) in nats, unscaled by T^2. A sampled estimate may be negative.

    Raises:
        ValueError: ``targets`` do not fit.
    """
    targets.check(len(student_logits), student_logits.shape[1])
    log_q = torch.log_softmax(in_full_precision(student_logits) / checked_temperature(targets.temperature), -1)
    ids, weights = targets.filled()
    value = targets.negative_entropy().to(log_q.dtype) - (weights.to(log_q.dtype) * log_q.gather(1, ids)).sum(1)
    if targets.log_inclusion is not None:
        known = log_q.gather(1, ids)
        taken_off = control(known, weights.to(log_q.dtype), targets.log_inclusion.to(log_q.dtype))
        # of value 0
        value = value + (taken_off * (known - known.detach())).sum(1)
    if targets.log_tail is None:
        return value
    tail = targets.log_tail.to(log_q.dtype).exp()
    log_other = log_q.exp().scatter(1, ids, 0.0).sum(1).clamp(min=torch.finfo(log_q.dtype).tiny).log()
    return value - torch.where(tail > 0, tail * log_other, 0.0)
