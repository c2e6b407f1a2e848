"""Matrices between hidden states of different widths: trained with the student, saved in checkpoints, and dropped with the stage.

They are no part of the student: no folder, no copy and no shard of it has them. They are the same on every rank, so their gradients are
summed here, and their moments are kept beside them.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..checkpoints.optimizer_moments import parameter_state, set_parameter_state
from ..processes.sharding import Rows
from ..processes.world import current_world, sum_over_ranks


class Projectors:
    """A hook that trains one matrix [H_t, H_s] for each pair of layers.

    Args:
        pairs: (student's layer, teacher's layer).
        student: Channels of the student's hidden states; teacher: those of the teacher's.
        seed: Seed of the first values, normal with variance 1 / H_s, so that a projected state has the size of the state.
        dtype: fp32, or fp64 for comparisons with an oracle.
    """

    name = "projectors"

    def __init__(self, pairs: Sequence[tuple[int, int]], student: int, teacher: int, seed: int, dtype: torch.dtype = torch.float32) -> None:
        # drawn on the CPU, so that they are the same on every rank and device
        random = torch.Generator().manual_seed(seed)
        self.weights = {
            pair: nn.Parameter((torch.randn(teacher, student, generator=random) / student**0.5).to(dtype)) for pair in sorted(set(pairs))
        }
        self._optimizer: torch.optim.Optimizer | None = None

    def __len__(self) -> int:
        return len(self.weights)

    def to(self, device: torch.device | str) -> None:
        """Moves the matrices."""
        for weight in self.weights.values():
            weight.data = weight.data.to(device)

    def on_start(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Lets the stage's optimizer step the matrices, at the rate of the student's weights and without decay."""
        self.to(next(student.parameters()).device)
        self._optimizer = optimizer
        # few and small beside the student: their moments are never stored in 8 bits
        group = {"params": list(self.weights.values()), "weight_decay": 0.0, "rate_share": 1.0, "optim_bits": 32}
        optimizer.add_param_group(group)

    def before_step(self, step: int) -> None:
        """Gives every rank the mean of the ranks' gradients, as DDP and FSDP2 give the student's."""
        ranks = current_world().size
        for weight in self.weights.values():
            if ranks > 1:
                # a rank whose windows have no token to predict has no gradient, and takes part with zeros
                given = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight.grad = sum_over_ranks(given).div_(ranks)

    def after_step(self, step: int) -> None:
        """Drops the gradients: Lightning's loop drops those of the student alone."""
        for weight in self.weights.values():
            weight.grad = None

    def state(self) -> dict[str, Tensor | Rows]:
        """Matrices and their moments."""
        assert self._optimizer is not None, "on_start comes first"
        found: dict[str, Tensor | Rows] = {}
        for pair, weight in self.weights.items():
            found[_key(pair)] = weight.detach()
            found |= {f"{_key(pair)}.{name}": moment for name, moment in parameter_state(self._optimizer, weight).items()}
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Sets matrices and moments."""
        assert self._optimizer is not None, "on_start comes first"
        with torch.no_grad():
            for pair, weight in self.weights.items():
                weight.copy_(state[_key(pair)])
                moments = {name: state[key] for name in ("step", "exp_avg", "exp_avg_sq") if (key := f"{_key(pair)}.{name}") in state}
                if moments:
                    set_parameter_state(self._optimizer, weight, moments)


def _key(pair: tuple[int, int]) -> str:
    return f"{pair[0]}-{pair[1]}"
