"""Movement pruning: weights that training moves away from zero stay, and those that it moves towards zero go.

Every weight has a score, which is 0 at the start and changes in each optimizer step by the gradient of the masked student,

    S <- S - r dL/dW W

with W the weight as it would be without its mask. Of each matrix the largest scores stay, a share that falls along the cubic schedule. A
weight that was pruned keeps its value and its score, and returns if its score rises; the rate r is the same for all and all steps, so it
changes no order and is 1. When the schedule is at its end the masks are final, and the weights below them are dropped.

Source: Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning" (arXiv 2005.07683), section 4, hard movement pruning.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ...models.common.errors import UserError
from ...models.pruning.magnitude import cubic_keep
from ...models.pruning.selection import exact_count, largest, pattern_mask
from ..processes.sharding import Rows, gathered, like, local, own_rows
from ..settings_sparsity import MovementSettings
from .hooks import KeepZeros, pattern_at


class MovementHook(KeepZeros):
    """Movement pruning of linear modules along the cubic schedule; weights that are zero at the start stay zero.

    The weights of the student always have their zeros, so that its forward pass is the masked one. What was pruned is kept beside them
    (``held``, zero where the mask keeps). Masks, scores and held weights are sharded as the weights are, and are the state.

    Args:
        modules: Names of the linear modules to prune.
        settings: Share kept or pattern, update interval and healing time.
        total_steps: Optimizer steps of the stage.
    """

    name = "movement"

    def __init__(self, modules: Iterable[str], settings: MovementSettings, total_steps: int) -> None:
        super().__init__(modules)
        self._settings, self._total = settings, total_steps
        self.scores: dict[str, Tensor] = {}
        """fp32 by module name; -inf for a weight that must stay zero."""
        self.held: dict[str, Tensor] = {}

    def on_start(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Starts from the current weights, all with equal scores."""
        super().on_start(student, optimizer)
        for name, mask in self.masks.items():
            weight = local(self._linears[name].weight)
            self.scores[name] = torch.zeros_like(weight, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
            self.held[name] = torch.zeros_like(weight)

    def before_step(self, step: int) -> None:
        """Adds the step to the scores, of pruned weights too, then drops their gradients."""
        with torch.no_grad():
            for name, scores in self.scores.items():
                weight = self._linears[name].weight
                if weight.grad is not None:
                    # local rows throughout: no communication under FSDP2
                    scores.addcmul_(local(weight.grad), local(weight) + self.held[name], value=-1)
        super().before_step(step)

    def after_step(self, step: int) -> None:
        """Applies the masks, and at an update of the schedule chooses new ones first."""
        # first the old ones: the step may have moved what they prune
        self._apply()
        # a function of the step alone: the same on all ranks, and after a resume
        if (keep := self.keep_at(step)) < self.keep_at(step - 1):
            self._choose(keep)
            self._apply()

    def keep_at(self, step: int) -> float:
        """Share of weights kept after step ``step``; at the last step it is always the target."""
        settings, share = self._settings, self._settings.share
        return share if step >= self._total else cubic_keep(step, self._total, share, settings.heal, settings.update_every)

    def reached(self, step: int) -> bool:
        """Whether the masks after ``step`` are final."""
        return self.keep_at(step) <= self._settings.share

    def state(self) -> dict[str, Tensor | Rows]:
        """Masks, scores and held weights."""
        parts = {"mask": self.masks, "score": self.scores, "held": self.held}
        return {
            f"{name}.{part}": like(tensor, self._linears[name].weight)
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Sets what was saved."""
        wanted = {f"{name}.{part}" for name in self._linears for part in ("mask", "score", "held")}
        if different := sorted(state.keys() ^ wanted):
            raise UserError(f"the checkpoint masks other modules than this stage: {different[0]} is in only one of them")
        for name in self._linears:
            device = self.scores[name].device
            self.scores[name] = state[f"{name}.score"].to(device)
            self.held[name] = state[f"{name}.held"].to(device)
        self._set_masks({name: state[f"{name}.mask"] for name in self._linears})
        self._apply()

    def _choose(self, keep: float) -> None:
        """Chooses the masks for a share, and exchanges weights with what is held."""
        # collective under FSDP2: all ranks go through the modules in the same order, and each computes the same masks
        for name, linear in self._linears.items():
            mask = self._mask(name, keep)
            with torch.no_grad():
                weight = local(linear.weight)
                latent = weight + self.held[name]
                weight.copy_(latent * mask)
                self.held[name] = latent.mul_(~mask)
            self._set_masks({name: mask})

    def _mask(self, name: str, keep: float) -> Tensor:
        """This rank's rows of the new mask."""
        weight, scores = self._linears[name].weight, self.scores[name]
        if (final := self._settings.nm) is not None:
            # a rank holds whole rows, and so whole groups
            return pattern_mask(scores, pattern_at(final, keep), scores > -torch.inf)
        everywhere = gathered(scores, weight)
        mask = largest(everywhere, exact_count(keep, everywhere.numel()), everywhere > -torch.inf)
        return own_rows(mask, weight)
