"""Reports the output error by kind of linear, next to that of a simple method, so that a method that gains nothing is visible."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLE = 256
"""Most rows of a linear that are measured, evenly spread: each of the three figures takes a product with H, too slow for all rows."""
_BLOCK = 512  # columns of H per product


@dataclass
class KindError:
    """Sums over all linears of one kind, such as ``mlp.down_proj``, and over their rows (at most ``SAMPLE`` rows of each linear)."""

    linears: int = 0
    energy: float = 0.0
    """Sum of w H w^T over rows w; H is the identity when nothing is known of the inputs."""
    error: float = 0.0
    """The same sum for w - q."""
    baseline: float = 0.0
    """The same sum for the simple method: rounding to nearest with absmax scales, or pruning by magnitude."""

    @property
    def relative(self) -> float:
        """``error`` divided by ``energy``."""
        return self.error / self.energy if self.energy else 0.0

    @property
    def relative_baseline(self) -> float:
        """``baseline`` divided by ``energy``."""
        return self.baseline / self.energy if self.energy else 0.0

    @property
    def nearest(self) -> float:
        """The earlier name of ``baseline``."""
        warnings.warn("KindError.nearest is called baseline", DeprecationWarning, stacklevel=2)
        return self.baseline

    @property
    def relative_nearest(self) -> float:
        """The earlier name of ``relative_baseline``."""
        warnings.warn("KindError.relative_nearest is called relative_baseline", DeprecationWarning, stacklevel=2)
        return self.relative_baseline

    def add(self, weight: Tensor, result: Tensor, baseline: Tensor, moments: Tensor | None) -> None:
        """Adds one linear: its weight [out, in], what became of it, and what the simple method would have made of it."""
        rows = sampled(len(weight))
        self.linears += 1
        self.energy += float(row_energy(weight[rows], moments).sum())
        self.error += float(row_energy(weight[rows] - result[rows], moments).sum())
        self.baseline += float(row_energy(weight[rows] - baseline[rows], moments).sum())


def sampled(rows: int) -> slice:
    """The rows that are measured of a linear with ``rows`` rows."""
    # the step is rounded up, so that at most SAMPLE rows remain
    return slice(0, rows, -(-rows // SAMPLE))


def row_energy(rows: Tensor, moments: Tensor | None) -> Tensor:
    """fp64 [out]: w H w^T per row w of ``rows`` [out, in]; ``moments`` is H [in, in], symmetric, or its diagonal [in], or None for 1."""
    # nothing is known of the inputs: all count alike
    if moments is None:
        return rows.square().sum(1, dtype=torch.float64)
    if moments.ndim == 1:
        # diagonal H: sum_i w_i^2 H_ii
        return (rows * moments).mul_(rows).sum(1, dtype=torch.float64)
    energy = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for at in range(0, rows.shape[1], _BLOCK):
        # H is symmetric: the part right of the diagonal block counts twice, which saves half of the products
        part = rows[:, at : at + _BLOCK]
        # [out, block] @ [block, in - at] -> [out, in - at]
        energy += 2 * (part @ moments[at : at + _BLOCK, at:]).mul_(rows[:, at:]).sum(1, dtype=torch.float64)
        energy -= (part @ moments[at : at + _BLOCK, at : at + _BLOCK]).mul_(part).sum(1, dtype=torch.float64)
    return energy


def linear_kind(module: str) -> str:
    """``mlp.down_proj`` for ``model.layers.3.mlp.down_proj``; the whole name if it contains no number."""
    parts = module.split(".")
    last = max((place for place, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])


def error_lines(errors: dict[str, KindError], known_inputs: bool, baseline: str = "to nearest") -> Iterable[str]:
    """Yields one line per kind: its relative error and that of the simple method, which ``baseline`` names."""
    what = "output" if known_inputs else "weight"
    width = max((len(kind) for kind in errors), default=0)
    for kind, error in errors.items():
        better = f", {error.relative_baseline:.2e} {baseline}" if error.baseline != error.error else ""
        yield f"{kind:<{width}}  squared {what} error {error.relative:.2e} of the whole{better}"
