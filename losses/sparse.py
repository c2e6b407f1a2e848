"""Forward KL to a teacher of whom a few probabilities per token are known: what caches and served teachers give.

With S the known tokens, w their weights, log q the student's log-probabilities with the full normaliser:

    bucket     sum_S w (log w - log q) + w_t (log w_t - log q_t),   w_t, q_t = mass of all other tokens
    sampled    -sum_S w log q - H,                                  H = the teacher's entropy

The bucket form compares V outcomes as |S| + 1: a lower bound of KL(teacher || student), and it keeps the student's mass in the tail
where the teacher has it. q_t is a sum over the other tokens, never 1 minus a sum, which is noise once S holds nearly everything.
The sampled form, with tokens drawn from the teacher and w = counts / draws, is an unbiased estimate of the KL, and so is its
gradient (Anshumann et al. 2025, arXiv 2503.16870); top tokens that are kept exactly beside samples of the rest are a case of it.

Where it is known with which probability r_v each token of S was drawn (1 = for certain), the sampled form has a term more:

    controlled  -sum_S w log q - H + c (sum_S q / r - 1)

sum_S q / r is 1 on average whatever q is, so for any c that does not depend on the draws value and gradient stay unbiased; but its
error goes with that of the first sum, and the noise of the gradient falls from (1 - r) w^2 to (1 - r) (w - c q / r)^2 a token: to nothing
as the student reaches the teacher (a difference estimator: Saerndal, Swensson & Wretman 1992, section 6.3). ``control_weight`` has c.
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


def control_weight(log_q: Tensor, weights: Tensor, log_inclusion: Tensor) -> Tensor:
    """c of the controlled form [N], a constant to autograd: min(1, P / Q) exp(-4 B), from what is the same in every draw.

    P and Q are what teacher and student leave for the tokens that are not known for certain, and B is the KL of the certain tokens and
    that rest as one bucket. Where both models have the same tail up to its size, min(1, P / Q) is the best c; a student far from the
    teacher (B of a nat or more) gets none, as q / r may be large where r is tiny. 4 was chosen by measurement (docs/lab-book.md).

    Args:
        log_q: [N, K] log-probabilities of the student.
        weights: [N, K], 0 where a slot is not in use.
        log_inclusion: [N, K].
    """
    certain = (log_inclusion >= 0) & (weights > 0)
    log_q, p = log_q.detach(), torch.where(certain, weights, 0.0)
    least = torch.finfo(log_q.dtype).eps
    rest = (1 - p.sum(1)).clamp(min=least)
    left = (1 - torch.where(certain, log_q.exp(), 0.0).sum(1)).clamp(min=least)
    inside = torch.where(certain, p * (p.clamp(min=torch.finfo(p.dtype).tiny).log() - log_q), 0.0).sum(1)
    bucket = inside + rest * (rest / left).log()
    return (rest / left).clamp(max=1) * torch.exp(-4 * bucket.clamp(min=0))


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
        inclusion = targets.log_inclusion.to(log_q.dtype)
        known = log_q.gather(1, ids)
        share = torch.where(weights > 0, (known - inclusion).exp(), 0.0).sum(1)
        value = value + control_weight(known, weights.to(log_q.dtype), inclusion) * (share - 1)
    if targets.log_tail is None:
        return value
    tail = targets.log_tail.to(log_q.dtype).exp()
    log_other = log_q.exp().scatter(1, ids, 0.0).sum(1).clamp(min=torch.finfo(log_q.dtype).tiny).log()
    return value - torch.where(tail > 0, tail * log_other, 0.0)
