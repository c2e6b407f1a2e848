"""The hook that finds the peak learning rate of a stage by how far its student starts from the teacher."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..learning_rates import rate_at_start
from ..plan import TrainingPlan


class StartRate:
    """Keeps the share of the plan's rate that the first step's KL decides; it is saved in checkpoints, so a resumed run keeps it too.

    The module asks for ``share`` before each step, and tells the KL of the first one, which it has computed with the untouched student.

    Args:
        plan: The stage's plan.
        say: Prints a line, on rank 0.
    """

    name = "start-rate"

    def __init__(self, plan: TrainingPlan, say: Callable[[str], None]) -> None:
        self._plan, self._say = plan, say
        self.kl: float | None = None

    @property
    def share(self) -> float:
        """Share of the plan's rate."""
        return 1.0 if self.kl is None else rate_at_start(self.kl)

    def see(self, kl: float) -> None:
        """Takes the mean KL of a step, nats per token; the first one counts."""
        if self.kl is not None:
            return
        self.kl = kl
        self._say(f"  peak learning rate {self._plan.learning_rate * self.share:.2g}, as the student starts at KL {kl:.3g}")

    def on_start(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Nothing to prepare."""

    def before_step(self, step: int) -> None:
        """Nothing to do: the module reads ``share`` when it sets the rate."""

    def after_step(self, step: int) -> None:
        """Nothing to do."""

    def state(self) -> Mapping[str, Tensor]:
        """The KL of the first step; NaN before it."""
        return {"kl": torch.tensor(math.nan if self.kl is None else self.kl, dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes the KL of the first step from a checkpoint."""
        kl = float(state["kl"])
        self.kl = None if math.isnan(kl) else kl
