"""Post-training quantization: round to nearest, searched scales and GPTQ.

After ``round_model(model, spec, RoundingMethod(method="gptq"), text=CalibrationText(batches=...))`` the model's weights are codes * scales.
"""

from ...models.calibration.calibration_text import CalibrationText as CalibrationText
from .methods import METHODS as METHODS
from .methods import MethodName as MethodName
from .methods import RoundingMethod as RoundingMethod
from .methods import ScaleChoice as ScaleChoice
from .walk import RoundedModel as RoundedModel
from .walk import amount_of_work as amount_of_work
from .walk import round_model as round_model


def __getattr__(name: str) -> object:
    if name == "Rounding":
        import warnings

        warnings.warn("decoct.qat.ptq.Rounding is called RoundingMethod", DeprecationWarning, stacklevel=2)
        return RoundingMethod
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
