"""LossSums: the contribution of a batch of tokens to a training step.

Sums, not means: only the optimizer step knows how many unmasked tokens its micro-batches and ranks have together.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LossSums:
    """Sums over the unmasked tokens of a batch: 0-dim tensors on the batch's device. Only ``loss`` has an autograd graph."""

    loss: Tensor
    """``(1 - hard_weight) * T^2 * D + hard_weight * cross_entropy`` in nats; fp32 (fp64 for fp64 inputs). 0 without tokens."""
    tokens: Tensor
    """Unmasked tokens, int64."""
    kl: Tensor
    """KL(teacher || student) at temperature 1, for every kind of loss; 0 without a teacher."""
    cross_entropy: Tensor
    """Cross-entropy of the student on the labels at temperature 1, for every weight of it in the loss."""
    teacher_entropy: Tensor
    """Entropy of the teacher at temperature 1; 0 without a teacher."""
    top1_matches: Tensor
    """Tokens at which the student's likeliest token is the teacher's (without a teacher: the label), ties included; int64."""
    covered_mass: Tensor
    """Mass of the teacher's distribution that is known exactly: the number of tokens if all of it is known, 0 without a teacher."""
