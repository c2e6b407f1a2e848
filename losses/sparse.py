"""Forward KL to a teacher of which only a few probabilities per token are known, as from a cache or a served teacher.

With S the known tokens, w their weights, log q the student's log-probabilities with the full normaliser:

    bucket     sum_S w (log w - log q) + w_t (log w_t - log q_t),   w_t, q_t = mass of all other tokens
    sampled    -sum_S w log q - H,                                  H = the teacher's entropy

The bucket form merges the V outcomes into |S| + 1. It is a lower bound of KL(teacher || student) and keeps the student's tail mass equal
to the teacher's. q_t is a sum over the other tokens, never 1 minus a sum, which is noise once S holds nearly all mass.
The sampled form, with tokens drawn from the teacher and w = counts / draws, is an unbiased estimate of the KL, and so is its
gradient (Anshumann et al. 2025, arXiv 2503.16870). Exact top tokens together with samples of the rest are a special case of it.

If the probability r_v with which each token of S was drawn is known (1 = for certain), this form has a gradient with less noise:

    controlled  -sum_S (w - x) log q - H,       x = c q / r, a constant to autograd

sum_S (q / r) grad log q is 0 on average, as sum_V grad q is, so the gradient stays unbiased for any c that does not depend on the draws.
Its error is correlated with that of the first sum, so the noise per token falls from (1 - r) w^2 to (1 - r) (w - c q / r)^2, and to 0 as
the student approaches the teacher (a difference estimator: Saerndal, Swensson & Wretman 1992, section 6.3). Where q is large and r tiny
it would grow without bound instead; ``control`` defines c and x and bounds x. The value is that of the sampled form.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .logits import checked_temperature, in_full_precision


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """The known part of a teacher's distribution at N positions."""

    ids: Tensor
    """[N, K] int64 in [0, V); the ids in use in a row are distinct."""
    log_weights: Tensor
    """[N, K] fp32 natural logarithms; -inf = the slot is unused. Every row has at least one slot in use."""
    entropy: Tensor
    """[N] fp32 entropy of the teacher's whole distribution in nats."""
    best: Tensor
    """[N] int64 the teacher's likeliest token."""
    log_tail: Tensor | None = None
    """[N] fp32 log of the mass outside ``ids`` (bucket form; -inf where it is 0); None = sampled form."""
    temperature: float = 1.0
    """Temperature of the distribution."""
    covered: Tensor | None = None
    """[N] fp32 mass that is known exactly, in [0, 1]; None = the sum of the weights."""
    log_inclusion: Tensor | None = None
    """[N, K] fp32 log of the probability with which each token was drawn, at most 0 (0 = for certain); None = not known."""

    def check(self, rows: int, v_eff: int) -> None:
        """Raises ValueError if the parts do not fit each other, ``rows`` positions or a vocabulary of ``v_eff`` tokens."""
        ids, weights = self.ids, self.log_weights
        if ids.ndim != 2 or ids.dtype != torch.int64 or weights.shape != ids.shape or ids.shape[1] < 1:
            raise ValueError(
                f"sparse targets need ids [N, K] int64 and log_weights [N, K] with K at least 1, not {tuple(ids.shape)} {ids.dtype} and "
                f"{tuple(weights.shape)}"
            )
        if self.log_inclusion is not None and (self.log_inclusion.shape != ids.shape or self.log_tail is not None):
            raise ValueError("log_inclusion of sparse targets belongs to the sampled form and has the shape of ids")
        others = {"entropy": self.entropy, "best": self.best, "log_tail": self.log_tail, "covered": self.covered}
        if wrong := [name for name, part in others.items() if part is not None and part.shape != ids.shape[:1]]:
            raise ValueError(f"{wrong[0]} of sparse targets must have shape [{len(ids)}], one number per position")
        if len(ids) != rows:
            raise ValueError(f"the teacher covers {len(ids)} positions and the student {rows}; both must see the same tokens")
        used = ids[weights > -torch.inf]
        if used.numel() and not (int(used.min()) >= 0 and int(used.max()) < v_eff):
            raise ValueError(
                f"sparse targets have token ids {int(used.min())} to {int(used.max())}, but the vocabulary has 0 to {v_eff - 1}; create "
                "them again with the student's tokenizer"
            )

    def __getitem__(self, rows: Tensor | slice) -> "SparseTargets":
        """The targets of some positions."""
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in [name for name, part in parts.items() if isinstance(part, Tensor)]:
            parts[name] = parts[name][rows]
        return SparseTargets(**parts)

    def covered_mass(self) -> Tensor:
        """[N] mass of the teacher's distribution that is known exactly."""
        return self.log_weights.exp().sum(1).clamp(max=1) if self.covered is None else self.covered

    def filled(self) -> tuple[Tensor, Tensor]:
        """(ids, weights) [N, K]. Unused slots get the first used id of their row and weight 0, so that they add nothing to a sum."""
        used = self.log_weights > -torch.inf
        # [N, 1]; argmax, which takes no bool, gives the first of equal values and so the first used slot
        first = self.ids.gather(1, used.to(torch.int8).argmax(1, keepdim=True))
        return torch.where(used, self.ids, first), self.log_weights.exp()

    def negative_entropy(self) -> Tensor:
        """[N] the part of the loss that does not depend on the student: sum w log w of the outcomes compared, or -H."""
        if self.log_tail is None:
            return -self.entropy
        # [N, K + 1]: the outcomes of the bucket form, the tail last
        parts = torch.cat([self.log_weights, self.log_tail.unsqueeze(1)], 1)
        return torch.special.entr(parts.exp()).sum(1).neg()


MOST_CONTROL = 4.0
"""Upper bound on x of the controlled form, as a multiple of the drawn token's weight (docs/lab-book.md, 2026-11-30)."""


def control(log_q: Tensor, weights: Tensor, log_inclusion: Tensor) -> Tensor:
    """x of the controlled form [N, K], a constant to autograd; 0 in unused slots.

    The noise per drawn token is c q / r - w = w (c q / p - 1). Over the tail the best c is mean (q / p) / mean (q / p)^2, weighted by p.
    A row knows p = w r only of its own draws, so each draw v gets its c from the other draws (leave one out):

        c_v = min(1, P / Q) exp(-mean over the other draws of log^2 (q P / (p Q)))

    P and Q are the masses that teacher and student give to the tokens not known for certain; P is the sum of the drawn weights, which is
    exact because the number of draws is fixed. Where log (q / p) is normal with variance s^2, this gives exp(-s^2 - s^4 / 4), and the best
    value is exp(-s^2). The only draw of a row gets c_v = 0. With c computed from all draws, which is the c of the tokens not drawn,

        x_v = min(c_v q / r - (c_v - c) q, 4 w)     drawn at random
        x_v = c q                                   known for certain

    The bound. A row may hold no draw from the region where p is tiny and q is not. No c computed from the row sees this region, where an
    unbiased estimate has noise q^2 / r. With x at most 4 w, a token's slope x - w stays within 3 w and its noise within nine times that of
    the sampled form, for every student (measurements: docs/lab-book.md, 2026-11-30).

    The bias. The bound adds a bias of c q - 4 p in expectation where c q > 4 p, so none while no token of the tail has more than
    four times the teacher's probability. Such a token is still pushed down, by (1 - c) q + 3 p instead of q - p, and the expected
    gradient is 0 only where q = p: with d_v >= 0 the amount cut off, q_v (1 + sum d) = p_v + d_v there, and d_v > 0 would need
    q_v sum d <= -3 p_v. In addition, the draws of a row exclude each other a little, so that c_v depends on whether v was drawn: some
    hundredths of the gradient, of either sign, which cancel over positions.

    Args:
        log_q: [N, K] log-probabilities of the student.
        weights: [N, K], 0 in unused slots.
        log_inclusion: [N, K].
    """
    log_q, used = log_q.detach(), weights > 0
    # an inclusion probability of 1 adds no noise: only tokens drawn at random need control
    drawn = used & (log_inclusion < 0)
    q, least = torch.where(used, log_q.exp(), 0.0), torch.finfo(log_q.dtype).eps
    # P and Q [N, 1]: masses outside the tokens known for certain
    rest = torch.where(drawn, weights, 0.0).sum(1, keepdim=True).clamp(min=least)
    left = (1 - torch.where(drawn, 0.0, q).sum(1, keepdim=True)).clamp(min=least)
    # w = p / r for a drawn token, so p = w r
    log_p = weights.clamp(min=torch.finfo(weights.dtype).tiny).log() + log_inclusion
    # log^2 (q P / (p Q)) of each draw
    distance = torch.where(drawn, log_q - log_p - (left / rest).log(), 0.0).square()
    count, whole = drawn.sum(1, keepdim=True), distance.sum(1, keepdim=True)
    # min(1, P / Q); 0 for the only draw of a row, which has no others to take c from
    most = torch.where(count > 1, (rest / left).clamp(max=1), 0.0)
    # leave one out: a c_v that saw draw v itself would bias the gradient
    own = most * torch.exp(-(whole - distance) / (count - 1).clamp(min=1))
    common = most * torch.exp(-whole / count.clamp(min=1))
    # c_v q / r - (c_v - c) q
    at_random = own * (log_q - log_inclusion).exp() - (own - common) * q
    return torch.where(drawn, torch.minimum(at_random, MOST_CONTROL * weights), common * q)


def sparse_forward_kl(student_logits: Tensor, targets: SparseTargets) -> Tensor:
    """Bucket or sampled forward KL per token, at the temperature of ``targets``; gradients flow into the student's logits.

    Args:
        student_logits: [N, V], any floating dtype, finite.
        targets: N positions.

    Returns:
        [N], fp32 (fp64 for fp64) in nats, without the factor T^2. A sampled estimate may be negative.

    Raises:
        ValueError: ``targets`` do not fit the logits (``SparseTargets.check``).
    """
    targets.check(len(student_logits), student_logits.shape[1])
    log_q = torch.log_softmax(in_full_precision(student_logits) / checked_temperature(targets.temperature), -1)
    ids, weights = targets.filled()
    # the whole sampled form; the bucket form still lacks its tail
    value = targets.negative_entropy().to(log_q.dtype) - (weights.to(log_q.dtype) * log_q.gather(1, ids)).sum(1)
    if targets.log_inclusion is not None:
        known = log_q.gather(1, ids)
        taken_off = control(known, weights.to(log_q.dtype), targets.log_inclusion.to(log_q.dtype))
        # adds to the gradient only: the value of the term is 0
        value = value + (taken_off * (known - known.detach())).sum(1)
    if targets.log_tail is None:
        return value
    tail = targets.log_tail.to(log_q.dtype).exp()
    # a sum over the other tokens: 1 minus the known sum would be rounding noise when the known tokens hold nearly all mass
    log_other = log_q.exp().scatter(1, ids, 0.0).sum(1).clamp(min=torch.finfo(log_q.dtype).tiny).log()
    # where the teacher has no tail, 0 log q_t is 0 whatever q_t is
    return value - torch.where(tail > 0, tail * log_other, 0.0)
