"""Reports the rounding error by kind of linear, next to that of rounding to nearest, so that a method that gains nothing is visible."""

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
    nearest: float = 0.0
    """The same sum for w - q, with q rounded to nearest with absmax scales."""

    @property
    def relative(self) -> float:
        """``error`` divided by ``energy``."""
        return self.error / self.energy if self.energy else 0.0

    @property
    def relative_nearest(self) -> float:
        """``nearest`` divided by ``energy``."""
        return self.nearest / self.energy if self.energy else 0.0


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


def error_lines(errors: dict[str, KindError], known_inputs: bool) -> Iterable[str]:
    """Yields one line per kind: its relative error and that of rounding to nearest."""
    what = "output" if known_inputs else "weight"
    width = max((len(kind) for kind in errors), default=0)
    for kind, error in errors.items():
        better = f", {error.relative_nearest:.2e} to nearest" if error.nearest != error.error else ""
        yield f"{kind:<{width}}  squared {what} error {error.relative:.2e} of the whole{better}"
