"""Forward KL to a teacher of whom a few probabilities per token are known: what caches and served teachers give.

With S the known tokens, w their weights, log q the student's log-probabilities with the full normaliser:

    bucket     sum_S w (log w - log q) + w_t (log w_t - log q_t),   w_t, q_t = mass of all other tokens
    sampled    -sum_S w log q - H,                                  H = the teacher's entropy

The bucket form compares V outcomes as |S| + 1: a lower bound of KL(teacher || student), and it keeps the student's mass in the tail
where the teacher has it. q_t is a sum over the other tokens, never 1 minus a sum, which is noise once S holds nearly everything.
The sampled form, with tokens drawn from the teacher and w = counts / draws, is an unbiased estimate of the KL, and so is its
gradient (Anshumann et al. 2025, arXiv 2503.16870); top tokens that are kept exactly beside samples of the rest are a case of it.
"""

from dataclasses import dataclass

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

    def check(self, rows: int, v_eff: int) -> None:
        """Raise ValueError, saying what is wrong, unless the parts fit each other, ``rows`` positions and ``v_eff`` tokens."""
        ids, weights = self.ids, self.log_weights
        if ids.ndim != 2 or ids.dtype != torch.int64 or weights.shape != ids.shape or ids.shape[1] < 1:
            raise ValueError(
                f"sparse targets need ids [N, K] int64 and log_weights [N, K] with K at least 1, not {tuple(ids.shape)} {ids.dtype} and "
                f"{tuple(weights.shape)}"
            )
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
        tail = None if self.log_tail is None else self.log_tail[rows]
        covered = None if self.covered is None else self.covered[rows]
        return SparseTargets(self.ids[rows], self.log_weights[rows], self.entropy[rows], self.best[rows], tail, self.temperature, covered)

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
    if targets.log_tail is None:
        return value
    tail = targets.log_tail.to(log_q.dtype).exp()
    log_other = log_q.exp().scatter(1, ids, 0.0).sum(1).clamp(min=torch.finfo(log_q.dtype).tiny).log()
    return value - torch.where(tail > 0, tail * log_other, 0.0)
