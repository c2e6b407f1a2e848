"""LossSums: what a batch of tokens contributes to a training step, as sums.

Sums and not means, because only the optimizer step knows how many unmasked tokens its micro-batches and ranks had together.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LossSums:
    """Sums over the unmasked tokens of a batch: 0-dim tensors on the batch's device. Only ``loss`` carries a graph."""

    loss: Tensor
    """``(1 - hard_weight) * T^2 * D + hard_weight * cross_entropy`` in nats; fp32 (fp64 for fp64 inputs). 0 without tokens."""
    tokens: Tensor
    """Unmasked tokens, int64."""
    kl: Tensor
    """KL(teacher || student) at temperature 1, whatever the loss is; 0 without a teacher."""
    cross_entropy: Tensor
    """Cross-entropy of the student on the labels at temperature 1, whatever its weight."""
    teacher_entropy: Tensor
    """Entropy of the teacher at temperature 1; 0 without a teacher."""
    top1_matches: Tensor
    """Tokens where the teacher's likeliest token (without a teacher: the label) is the student's likeliest, ties included; int64."""
    covered_mass: Tensor
    """Mass of the teacher's distribution that is known exactly: the number of tokens for a teacher that is known whole, 0 without one."""
