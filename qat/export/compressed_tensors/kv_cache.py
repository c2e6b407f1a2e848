"""Keys and values in compressed-tensors exports: ``kv_cache_scheme`` in the config, ``<attention module>.k_scale`` and ``.v_scale`` [1].

Servers read symmetric fp8 with one stored scale for the keys and one for the values of each layer. An int8 scheme could be written, and
compressed-tensors itself would compute with it, but vLLM takes any scheme of 8 bits for fp8.

Source: compressed-tensors ``quantization/quant_config.py``, ``quantization/lifecycle/initialize.py``; vLLM
``compressed_tensors/compressed_tensors.py`` (``CompressedTensorsKVCacheMethod``), ``attention/layer.py``.
"""

from typing import Any

import torch
from torch import Tensor

from ....models.common.errors import UserError
from ...source.quantized_source import ExportSource

_WANTED = "kv_cache: {kind: fp8_e4m3, scaling: static}"


def check_cache(source: ExportSource) -> None:
    """Refuse what ``kv_cache_scheme`` cannot say, or servers do not read.

    Raises:
        UserError: another lattice than symmetric fp8 with stored scales, or scales that are not there.
    """
    cache = source.state.cache
    if cache is None:
        return
    if cache.spec.kind != "fp8_e4m3":
        raise UserError(
            f"kv_cache is {cache.spec.kind}, and vLLM takes any such scheme of 8 bits for fp8: it would serve another model; "
            f"quantize with {_WANTED}, or leave kv_cache out and let the server round by itself"
        )
    if cache.spec.scaling != "static":
        raise UserError(
            "kv_cache takes scales of each token, for which compressed-tensors has no words (servers have an option of their own); "
            f"quantize with {_WANTED}, or leave kv_cache out"
        )
    if problem := cache.problem():
        raise UserError(f"{source.folder}: {problem}; train or calibrate it again")


def cache_scheme(source: ExportSource) -> dict[str, Any] | None:
    """``kv_cache_scheme`` of ``quantization_config``; None when keys and values are not rounded."""
    if source.state.cache is None:
        return None
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
    """The stored scales, fp32 [1], by the names that readers look for."""
    cache = source.state.cache
    return {} if cache is None else {f"{name}_scale": cache.scales[name].to(torch.float32).reshape(1) for name in cache.names}
