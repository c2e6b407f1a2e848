"""Rounding after training: round to nearest, searched scales, GPTQ.

round_model(model, spec, Rounding(method="gptq"), text=CalibrationText(batches=...))     the model then holds codes * scales
"""

from .calibration_text import CalibrationText as CalibrationText
from .methods import METHODS as METHODS
from .methods import MethodName as MethodName
from .methods import Rounding as Rounding
from .methods import ScaleChoice as ScaleChoice
from .walk import RoundedModel as RoundedModel
from .walk import amount_of_work as amount_of_work
from .walk import round_model as round_model
