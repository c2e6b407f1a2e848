"""The old place of ``round_cache``: import from ``decoct.qat``."""

import warnings

from .layers.kv_cache_hooks import round_cache as round_cache

warnings.warn("decoct.qat.kv_cache has moved: import from decoct.qat", DeprecationWarning, stacklevel=2)
