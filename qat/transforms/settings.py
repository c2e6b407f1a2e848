"""Settings of a transform before rounding. The file imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ... import Bounds, check_fields

TransformName = Literal["awq", "smoothquant", "rotation"]


@dataclass(frozen=True, kw_only=True)
class TransformSettings:
    """A change of the weights before they are rounded that leaves the unrounded model as it is.

    An option that is not given gets its default. An option that the method does not have stays None; giving one is an error.
    """

    method: TransformName
    """awq = scales of input channels, searched for the smallest error of the outputs (arXiv 2306.00978); smoothquant = scales that move
    outliers from inputs to weights (arXiv 2211.10438); rotation = random Hadamard rotations (arXiv 2404.00456, 2405.16406). Scales and
    rotations are folded into norms and linears, so that every runtime reads the result as a plain model."""
    alpha: Annotated[float, Bounds(ge=0, le=1, why="it is the share of the outliers that moves to the weights; 0.5 is usual")] | None = None
    """smoothquant: scales are max|input|^alpha / max|weight|^(1 - alpha). Default: 0.5."""
    clip: bool | None = None
    """awq: also search how far the largest magnitude of each group is cut, for method rtn. The cut itself is a change of the model.
    Default: false."""
    residual: bool | None = None
    """rotation: rotate the residual stream (R1); an output head that is tied to the embedding gets weights of its own. Default: true."""
    heads: bool | None = None
    """rotation: rotate each head between values and attention output (R2). Default: true."""

    def __post_init__(self) -> None:
        check_fields(self)
        self._fill("alpha", 0.5, "smoothquant")
        self._fill("clip", False, "awq")
        self._fill("residual", True, "rotation")
        self._fill("heads", True, "rotation")
        if self.residual is False and self.heads is False:
            raise ValueError("residual=False and heads=False leave nothing to rotate; leave one out, or the transform")

    @property
    def calibrates(self) -> bool:
        """Whether it looks at calibration text."""
        return self.method != "rotation"

    def _fill(self, dial: str, default: object, method: str) -> None:
        value = getattr(self, dial)
        if self.method != method:
            if value is not None:
                raise ValueError(f"{dial}={value} has no effect with method={self.method}: it belongs to {method}; leave it out")
        elif value is None:
            # the dataclass is frozen, and records and stage keys show the numbers that are used
            object.__setattr__(self, dial, default)
