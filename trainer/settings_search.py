"""Settings of the search for a shape within a budget."""

from dataclasses import dataclass
from typing import Annotated

from .. import Bounds, Count, check_fields
from ..models.shape_search import Grid


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How the shape of a budget is found: aligned shapes are ranked by the scores that go, the best of these by the KL as cut on some
    calibration windows, and the best of these, with ``tokens``, by the KL after short distillation."""

    align: Annotated[int, Bounds(ge=1, le=4096)] = 128
    """Widths (FFN channels, hidden channels, heads x head_dim) are multiples of this, 128 x the number of GPUs for tensor parallelism.
    Small models take a smaller power of two, so that there are about eight steps."""
    least: Annotated[float, Bounds(gt=0, le=1)] = 0.3
    """Share of each axis that stays at least."""
    bits: Annotated[int, Bounds(ge=2, le=16)] = 16
    """Bits of the decoder's linear weights as served, for a budget in bytes."""
    context: Annotated[int, Bounds(ge=0)] = 0
    """Tokens of one sequence whose keys and values (16 bits) count in a budget in bytes."""
    measured: Count = 32
    """Shapes whose KL from the input of the stage is measured as cut."""
    windows: Count = 8
    """Calibration windows on which the KL is measured."""
    tokens: Count | None = None
    """Tokens of the first round of short distillation from the input of the stage; each further round has four times as many. Default: no
    distillation, the KL as cut decides."""
    halving: tuple[Count, ...] = (16, 4)
    """With ``tokens``: shapes that each round distils. The best of the last round is the result, as cut."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.halving:
            raise ValueError("halving=[] distils nothing; give the shapes of each round, such as [16, 4], or leave 'tokens' out")
        if list(self.halving) != sorted(set(self.halving), reverse=True):
            raise ValueError(f"halving={list(self.halving)} must fall from round to round, such as [16, 4]")
        if self.tokens is not None and self.halving[0] > self.measured:
            raise ValueError(f"halving={list(self.halving)} distils more shapes than measured={self.measured}; raise 'measured'")

    @property
    def grid(self) -> Grid:
        """Which shapes are tried."""
        return Grid(align=self.align, least=self.least, bits=self.bits, context=self.context)

    def rounds(self) -> list[tuple[int, int]]:
        """(shapes, tokens of each) of the rounds of short distillation; [] without ``tokens``."""
        return [] if self.tokens is None else [(shapes, self.tokens * 4**number) for number, shapes in enumerate(self.halving)]
