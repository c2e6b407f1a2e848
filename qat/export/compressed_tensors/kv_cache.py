"""Keys and values in compressed-tensors exports: ``kv_cache_scheme`` in the config, ``<attention module>.k_scale`` and ``.v_scale`` [1].

Servers read symmetric fp8 with one stored scale for the keys and one for the values of each layer. compressed-tensors itself could compute
with an int8 scheme, but vLLM takes any 8-bit scheme for fp8.

Source: compressed-tensors ``quantization/quant_config.py``, ``quantization/lifecycle/initialize.py``; vLLM
``compressed_tensors/compressed_tensors.py`` (``CompressedTensorsKVCacheMethod``), ``attention/layer.py``.
"""

from typing import Any

import torch
from torch import Tensor

from ...source.quantized_source import ExportSource


def cache_scheme(source: ExportSource) -> dict[str, Any] | None:
    """Return the ``kv_cache_scheme`` of ``quantization_config``; None if keys and values are not rounded."""
    if source.state.cache is None:
        return None
    # the one scheme that servers read; ``limits/compressed_tensors.py`` refuses all others
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor",
        "group_size": None,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def cache_tensors(source: ExportSource) -> dict[str, Tensor]:
    """Return the stored scales, fp32 [1], under the names that readers look for."""
    cache = source.state.cache
    return {} if cache is None else {f"{name}_scale": cache.scales[name].to(torch.float32).reshape(1) for name in cache.names}
