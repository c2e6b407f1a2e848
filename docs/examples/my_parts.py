"""An example of every kind of part; docs/examples/my_recipe.yaml uses them all, and docs/how-to/extend.md explains them."""

import random
from collections.abc import Iterator
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from decoct import Bounds, parts


@parts.divergence("squared_hellinger")
def squared_hellinger(student: Tensor, teacher: Tensor, *, sharpness: Annotated[float, Bounds(gt=0)] = 1.0) -> Tensor:
    """Half the squared distance between the roots of the probabilities, to a power: 0 where the models agree, 1 where they share nothing.

    ``student`` and ``teacher`` are log-probabilities [n, V]; the result is [n], in [0, 1].
    """
    overlap = (0.5 * (student + teacher)).exp().sum(-1)
    return (1 - overlap).clamp(min=1e-12) ** sharpness


@parts.data_source("sums")
def sums(*, documents: int = 2000, digits: Annotated[int, Bounds(ge=1, le=9)] = 2, seed: int = 0) -> Iterator[str]:
    """Documents of small sums, drawn anew from the seed at each call: the same call gives the same text."""
    rng = random.Random(seed)
    for _ in range(documents):
        numbers = [(rng.randrange(10**digits), rng.randrange(10**digits)) for _ in range(12)]
        yield "\n".join(f"{a} + {b} = {a + b}" for a, b in numbers)


@parts.stage("add_noise")
def add_noise(context: parts.Context, *, strength: Annotated[float, Bounds(gt=0, le=1)] = 0.01) -> dict[str, Any]:
    """Add Gaussian noise to every matrix, in units of its own standard deviation: how much rounding could the model bear?"""
    model = context.load()
    generator = torch.Generator().manual_seed(context.seed)
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    with torch.no_grad():
        for weight in matrices:
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise.to(weight.device), alpha=strength * float(weight.std()))
    context.say(f"added noise of {strength:g} standard deviations to {len(matrices)} matrices")
    context.save(model)
    return {"matrices": len(matrices)}


@parts.callback("moving_average")
class MovingAverage:
    """Ends the training with a moving average of the weights in place of the last ones."""

    def __init__(self, *, decay: Annotated[float, Bounds(ge=0, lt=1)] = 0.9, last_step: int | None = None) -> None:
        self.decay, self.last_step = decay, last_step
        self.student: nn.Module | None = None
        self.average: dict[str, Tensor] = {}

    def on_start(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Begin with the weights as they are; a resumed stage gets its average back by ``load``."""
        self.student = student
        self.average = {name: weight.detach().clone() for name, weight in student.named_parameters()}

    def after_step(self, step: int) -> None:
        """Move the average, and put it into the student after the last step."""
        assert self.student is not None
        with torch.no_grad():
            for name, weight in self.student.named_parameters():
                self.average[name].lerp_(weight, 1 - self.decay)
                if step == self.last_step:
                    weight.copy_(self.average[name])

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs; kept in every checkpoint."""
        return self.average

    def load(self, state: dict[str, Tensor]) -> None:
        """Take it back, onto the student's device."""
        for name, tensor in state.items():
            self.average[name].copy_(tensor)
