"""Quantization: what a quantized weight is, training through the rounding, rounding without training, exports and the judges of them."""

import sys
from typing import TYPE_CHECKING

from .. import CallablePackage, lazy_names

if TYPE_CHECKING:
    from .codes.state import QuantState as QuantState
    from .codes.state import load_quant_state as load_quant_state
    from .export.export import export_folder as export_folder
    from .fake_quant import decode as decode
    from .fake_quant import dequantize as dequantize
    from .fake_quant import encode as encode
    from .fake_quant import fake_quant_activation as fake_quant_activation
    from .fake_quant import fake_quant_learned as fake_quant_learned
    from .fake_quant import quantize as quantize
    from .fake_quant import quantize_with as quantize_with
    from .fake_quant import static_scale as static_scale
    from .layers.input_hooks import round_inputs as round_inputs
    from .layers.kv_cache_hooks import round_cache as round_cache
    from .layers.quantized_model import fold as fold
    from .layers.quantized_model import prepare as prepare
    from .layers.quantized_model import quantize_model as quantize_model
    from .layers.save_folder import save_quantized_folder as save_quantized_folder
    from .ptq import CalibrationText as CalibrationText
    from .ptq import round_model as round_model
    from .rebuild import load_exported_model as load_exported_model
    from .rounding_method import RoundingMethod as RoundingMethod
    from .scheme import QuantScheme as QuantScheme
    from .scheme import SpecChange as SpecChange
    from .spec import ActivationSpec as ActivationSpec
    from .spec import QuantSpec as QuantSpec
    from .verify.verify import verify_folder as verify_folder

__getattr__, __dir__ = lazy_names(__name__)
sys.modules[__name__].__class__ = CallablePackage
