"""Modules and hooks of a model that is being quantized: layers that round their weights, hooks on inputs, keys and values."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .input_hooks import round_inputs as round_inputs
    from .kv_cache_hooks import round_cache as round_cache
    from .quantized_model import QuantLinear as QuantLinear
    from .quantized_model import fold as fold
    from .quantized_model import prepare as prepare
    from .quantized_model import quantize_model as quantize_model
    from .save_folder import save_quantized_folder as save_quantized_folder

__getattr__, __dir__ = lazy_names(__name__)
