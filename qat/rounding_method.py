"""How weights are rounded after training: the method, its dials, and what it needs to know of a linear's inputs. It imports no torch.

``ptq.methods`` has the methods themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .spec import ActivationSpec
from .transforms.settings import TransformSettings

MethodName = Literal["rtn", "mse", "gptq"]
ScaleChoice = Literal["absmax", "mse", "fitted"]
Needs = Literal["nothing", "diagonal", "hessian"]


@dataclass(frozen=True, kw_only=True)
class RoundingMethod:
    """How weights are rounded. A method ignores the fields that it does not use."""

    method: MethodName = "rtn"
    scale: ScaleChoice = "fitted"
    """gptq: source of its scales. absmax = the largest magnitude; mse = a search for the least error of the weights; fitted = that search,
    then least squares over the outputs in turn with the rounding. Kinds other than int are searched in place of fitted."""
    damping: float = 0.01
    """gptq: share of the Hessian's mean diagonal added to its diagonal."""
    activation_order: bool = True
    """gptq: round the columns with the largest inputs first."""
    weighted: bool = False
    """mse: weight the error of each weight by the mean square of its input."""
    activations: ActivationSpec | None = None
    """How the inputs of the rounded linears are quantized in serving; None = they are not."""
    kv_cache: ActivationSpec | None = None
    """How keys and values are quantized in serving; None = they are not."""
    transform: TransformSettings | None = None
    """What is done to the weights of each layer before they are rounded; None = nothing."""

    @property
    def observes(self) -> bool:
        """Whether static scales need ranges that are measured on calibration text, or outliers are counted on it."""
        return any(spec is not None and spec.observes for spec in (self.activations, self.kv_cache))

    @property
    def transforms_on_text(self) -> bool:
        """Whether the transform looks at calibration text."""
        return self.transform is not None and self.transform.calibrates

    @property
    def calibrates(self) -> bool:
        """Whether anything needs calibration text: the method, ranges of static scales, or the transform."""
        return self.needs != "nothing" or self.observes or self.transforms_on_text

    @property
    def needs(self) -> Needs:
        """What the method needs to know of the inputs; everything but 'nothing' needs calibration text, as ``observes`` does."""
        return NEEDS[self.method](self)


NEEDS: dict[MethodName, Callable[[RoundingMethod], Needs]] = {
    "rtn": lambda _: "nothing",
    "mse": lambda rounding: "diagonal" if rounding.weighted else "nothing",
    "gptq": lambda _: "hessian",
}
"""Method -> what it needs to know of the inputs."""
