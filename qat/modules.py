"""The old place of ``fold``, ``prepare``, ``quantize_model``: import from ``decoct.qat``."""

import warnings

from .layers.quantized_model import fold as fold
from .layers.quantized_model import prepare as prepare
from .layers.quantized_model import quantize_model as quantize_model

warnings.warn("decoct.qat.modules has moved: import from decoct.qat", DeprecationWarning, stacklevel=2)
