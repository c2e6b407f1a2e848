"""How much rounding has cost, by kind of linear: beside rounding to nearest, so that a method which does not pay shows at once."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLE = 256
"""Rows of a linear, evenly spread, that stand for all of them: what all cost takes a product with H for each of three figures."""
_BLOCK = 512  # columns of H at a time


@dataclass
class KindError:
    """Sums over all linears of one kind, such as ``mlp.down_proj``: over all their rows, or ``SAMPLE`` rows of each that has more."""

    linears: int = 0
    energy: float = 0.0
    """sum of w H w^T over rows w; H = 1 when nothing is known of the inputs."""
    error: float = 0.0
    """The same of w - q."""
    nearest: float = 0.0
    """The same of w - q of rounding to nearest with absmax scales."""

    @property
    def relative(self) -> float:
        """Error as a share of the energy."""
        return self.error / self.energy if self.energy else 0.0

    @property
    def relative_nearest(self) -> float:
        """``relative`` of rounding to nearest."""
        return self.nearest / self.energy if self.energy else 0.0


def sampled(rows: int) -> slice:
    """Which rows of a linear of so many are looked at."""
    return slice(0, rows, -(-rows // SAMPLE))


def row_energy(rows: Tensor, moments: Tensor | None) -> Tensor:
    """fp64 [out]: w H w^T of each row w of ``rows`` [out, in]; H [in, in] and symmetric, its diagonal [in], or None for 1."""
    if moments is None:
        return rows.square().sum(1, dtype=torch.float64)
    if moments.ndim == 1:
        return (rows * moments).mul_(rows).sum(1, dtype=torch.float64)
    energy = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for at in range(0, rows.shape[1], _BLOCK):
        # of a symmetric matrix, what lies right of the diagonal counts twice
        part = rows[:, at : at + _BLOCK]
        energy += 2 * (part @ moments[at : at + _BLOCK, at:]).mul_(rows[:, at:]).sum(1, dtype=torch.float64)
        energy -= (part @ moments[at : at + _BLOCK, at : at + _BLOCK]).mul_(part).sum(1, dtype=torch.float64)
    return energy


def kind_of(module: str) -> str:
    """``mlp.down_proj`` of ``model.layers.3.mlp.down_proj``; the whole name where it has no number."""
    parts = module.split(".")
    last = max((place for place, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])


def error_lines(errors: dict[str, KindError], known_inputs: bool) -> Iterable[str]:
    """A line for each kind: its relative error and what rounding to nearest would have left."""
    what = "output" if known_inputs else "weight"
    width = max((len(kind) for kind in errors), default=0)
    for kind, error in errors.items():
        better = f", {error.relative_nearest:.2e} to nearest" if error.nearest != error.error else ""
        yield f"{kind:<{width}}  squared {what} error {error.relative:.2e} of the whole{better}"
