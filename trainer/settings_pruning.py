"""Settings of the stage that prunes: whole channels in one shot, or single weights along a schedule."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from .. import Bounds, Count, check_fields
from .settings import ShareOfSteps, TrainingBlock
from .settings_structured import StructuredSettings as StructuredSettings


@dataclass(frozen=True, kw_only=True)
class MagnitudeSettings:
    """Set the smallest weights of the decoder's linear layers to zero, along a cubic schedule (Zhu & Gupta 2017)."""

    keep: Annotated[float, Bounds(gt=0, lt=1, why="it is the share of the weights that stays")]
    """Share of these weights that is kept."""
    scope: Literal["layer", "global"] = "layer"
    """layer = choose inside each matrix; global = choose over all matrices, each normalized by its mean magnitude."""
    update_every: Count = 10
    """Optimizer steps between mask updates."""
    heal: ShareOfSteps = 0.25
    """Share of the steps, at the end, that train with the final mask."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class PruneSettings(TrainingBlock):
    """Prune by exactly one of ``structured`` (one shot, on calibration text) and ``magnitude`` (trains when tokens or steps are given)."""

    exactly_one: ClassVar = ("structured", "magnitude")

    structured: StructuredSettings | None = None
    """Remove FFN channels."""
    magnitude: MagnitudeSettings | None = None
    """Set single weights to zero."""
    calibration_tokens: Count = 32_768
    """structured: tokens of training text that channels are scored on, in windows from all over the text, chosen by the seed."""
    allow_partial: bool = False
    """magnitude: continue when less than 95% of the decoder's weights are in linears. The other weights are all kept."""

    def __post_init__(self) -> None:
        TrainingBlock.__post_init__(self)
        if (self.structured is None) == (self.magnitude is None):
            raise ValueError("a prune stage needs exactly one of 'structured' and 'magnitude'")
        if self.structured is not None and (self.tokens is not None or self.steps is not None):
            raise ValueError("structured pruning is one shot and takes no 'tokens' or 'steps'; add a distill stage after it")
