"""Settings of the methods that set single weights to zero."""

from dataclasses import dataclass
from typing import Annotated, Literal

from .. import Bounds, Count, check_fields
from ..models.pruning.pattern import Pattern, parse_pattern
from .settings import ShareOfSteps

CALIBRATION_TOKENS = 262_144
"""Default for methods that calibrate on text: 128 windows of 2,048 tokens, as in the papers."""


@dataclass(frozen=True, kw_only=True)
class WeightSettings:
    """What every method that sets weights to zero has: the share that stays, as a number or by a pattern."""

    keep: Annotated[float, Bounds(gt=0, lt=1, why="it is the share of the weights that stays")] | None = None
    """Share of the weights of the decoder's linear layers that is kept. Give this or pattern."""
    pattern: str | None = None
    """N:M, such as 2:4: of each M consecutive input features of an output row, N weights are kept. M must divide the inputs of every
    linear. Default: any weights."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.keep is None and self.pattern is None:
            raise ValueError("needs 'keep', the share of the weights that stays, or 'pattern', such as 2:4")
        nm = self.nm
        if nm is not None and self.keep is not None and abs(self.keep - nm.share) > 1e-9:
            raise ValueError(f"keep={self.keep:g} contradicts pattern={self.pattern}, which keeps {nm.share:g}; leave keep out")

    @property
    def nm(self) -> Pattern | None:
        """``pattern`` as numbers; None without one.

        Raises:
            ValueError: it is no pattern.
        """
        return None if self.pattern is None else parse_pattern(self.pattern)

    @property
    def share(self) -> float:
        """Share of the weights that stays."""
        if (nm := self.nm) is not None:
            return nm.share
        assert self.keep is not None
        return self.keep

    def words(self) -> str:
        """What stays, as a message says it: 2:4, or 50%."""
        return str(self.nm or f"{self.share:.4g}")


@dataclass(frozen=True, kw_only=True)
class MagnitudeSettings(WeightSettings):
    """Set the smallest weights of the decoder's linear layers to zero, along a cubic schedule (Zhu & Gupta 2017)."""

    scope: Literal["layer", "global"] = "layer"
    """layer = choose inside each matrix; global = choose over all matrices, each normalized by its mean magnitude. With a pattern, each
    group is chosen alone."""
    update_every: Count = 10
    """Optimizer steps between mask updates."""
    heal: ShareOfSteps = 0.25
    """Share of the steps, at the end, that train with the final mask."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is not None and self.scope == "global":
            raise ValueError("scope=global has no effect with pattern, which chooses inside each group; leave it out")


@dataclass(frozen=True, kw_only=True)
class WandaSettings(WeightSettings):
    """Set to zero, in each output row, the weights with the smallest magnitude times norm of their input on calibration text
    (arXiv 2306.11695). One shot; weights that stay keep their values."""


@dataclass(frozen=True, kw_only=True)
class SparseGptSettings(WeightSettings):
    """Set weights to zero column by column on calibration text; later columns make up for the error (arXiv 2301.00774). One shot."""

    damping: Annotated[float, Bounds(ge=0, le=1, why="it is a share of the Hessian's mean diagonal; 0.01 is usual")] = 0.01
    """Share of the Hessian's mean diagonal that is added to its diagonal; raised tenfold at a time, and reported, where that is not
    enough."""


@dataclass(frozen=True, kw_only=True)
class MovementSettings(WeightSettings):
    """Set to zero, in each matrix, the weights that training moves towards zero, along a cubic schedule (arXiv 2005.07683)."""

    update_every: Count = 10
    """Optimizer steps between mask updates. A pruned weight returns if its score rises."""
    heal: ShareOfSteps = 0.25
    """Share of the steps, at the end, that train with the final mask."""
