"""What a user may choose about a distillation loss (plain data, no torch import)."""

from dataclasses import dataclass
from typing import Literal

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Loss of one training stage: ``(1 - hard_weight) * T^2 * D(teacher, student) + hard_weight * cross-entropy``."""

    divergence: Divergence = "forward_kl"
    """forward_kl = KL(teacher || student); reverse_kl = KL(student || teacher); jsd = normalised D / (beta (1 - beta))."""
    temperature: float = 1.0
    """Softmax temperature T of both models, > 0; never applied to the cross-entropy term."""
    t_squared: bool = True
    """Multiply the divergence by T^2, so that gradients keep their size when T changes."""
    beta: float = 0.5
    """Mixture weight of jsd, in (0, 1); unused by the others."""
    hard_weight: float = 0.0
    """Weight of the cross-entropy on the data's own labels, in [0, 1]. 1 trains without a teacher."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be greater than 0; 1.0 leaves the logits as they are")
        if not 0 <= self.hard_weight <= 1:
            raise ValueError(f"hard_weight={self.hard_weight} must lie in [0, 1]; 0 trains on the teacher alone")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta={self.beta} must lie strictly between 0 and 1; use forward_kl or reverse_kl for the ends")
