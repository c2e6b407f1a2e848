"""Codes and scales of a quantized model: in memory, in its folder, and the checks on reading them."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .kv_cache_scales import CacheState as CacheState
    from .state import QUANT_FILE as QUANT_FILE
    from .state import QuantState as QuantState
    from .state import load_quant_state as load_quant_state

__getattr__, __dir__ = lazy_names(__name__)
