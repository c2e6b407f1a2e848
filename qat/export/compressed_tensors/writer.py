"""The compressed-tensors formats of integers and floats, read by transformers, vLLM and SGLang.

pack-quantized: integer codes in 32-bit words along the inputs, zero points packed along the outputs. int-quantized: unpacked int8
codes with one scale per row, for modules whose inputs are rounded to int8 too. ``floats.py`` has the layouts of floats. Each spec gets a
group of its own.

The writer rounds nothing: codes and scales are those of training. Scales are on the bf16 grid and are stored as bf16; unquantized tensors
must be on it too (those of a quantized folder do). Writing does not need the package compressed-tensors.

Source: compressed-tensors ``compressors/pack_quantized/base.py``, ``compressors/naive_quantized/base.py``,
``quantization/quant_config.py``; transformers ``quantizers/quantizer_compressed_tensors.py``.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....models.common.errors import UserError
from ...packing import pack_bits
from ...source.quantized_source import ExportSource
from ...spec import ActivationSpec
from ..common import Layer, exact_plain, exact_scales, layer, unquantized_config
from ..shards import plan_shards, write_shards
from ..stored_parts import compressed_tensors_parts, stored_bytes
from .config import LAYOUT_VERSION, NAME, quantization_config
from .floats import check_global_scales, e4m3_scales, exponent_bytes, pack_pairs
from .kv_cache import cache_tensors

__all__ = ["LAYOUT_VERSION", "NAME", "check_values", "exported_config", "planned_bytes", "quantization_config", "write"]


def check_values(source: ExportSource) -> None:
    """Refuse missing or invalid stored scales of inputs, keys and values, and global scales that servers would mix up.

    Raises:
        UserError: a scale is missing, not finite or not positive, or parts of one matrix have different global scales; names the module.
    """
    state = source.state
    check_global_scales(source)
    if state.activations is not None and state.activations.scaling == "static":
        for module in state.modules:
            _check_inputs(source, module, state.activations)
    if state.cache is not None and (problem := state.cache.problem()):
        raise UserError(f"{source.folder}: {problem}; train or calibrate it again")


def _check_inputs(source: ExportSource, module: str, inputs: ActivationSpec) -> None:
    if not _is_scale(source.state.input_scales.get(module)):
        raise UserError(
            f"{module} has static activations but no input scale that is one finite positive number; train or calibrate it again"
        )
    if not inputs.symmetric and module not in source.state.input_zeros:
        raise UserError(f"{module} has asymmetric static activations but no input zero point; train or calibrate it again")


def _is_scale(scale: Tensor | None) -> bool:
    return scale is not None and scale.numel() == 1 and bool((torch.isfinite(scale) & (scale > 0)).all())


def exported_config(source: ExportSource) -> dict[str, Any]:
    """Return the export's ``config.json``: the model's own, in bf16, with a description of the packing."""
    return unquantized_config(source, torch.bfloat16) | {"quantization_config": quantization_config(source)}


def planned_bytes(source: ExportSource) -> int:
    """Bytes of tensor data that ``write`` will store."""
    return sum(_sizes(source).values())


def write(folder: Path, source: ExportSource) -> None:
    """Write the weight files (one, or shards with an index) into ``folder``.

    Raises:
        UserError: an unquantized tensor has values that bf16 does not hold.
    """
    write_shards(folder, plan_shards(_sizes(source)), lambda name: _stored(source, name))


def _sizes(source: ExportSource) -> dict[str, int]:
    """Return the bytes of every stored tensor, in the order of writing."""
    sizes: dict[str, int] = {}
    for module in source.state.modules:
        rows, columns = source.state.codes[module].shape
        parts = compressed_tensors_parts(rows, columns, source.state.spec_of(module), source.state.activations)
        sizes |= {f"{module}.{part}": stored_bytes(tensor) for part, tensor in parts.items()}
    sizes |= {name: tensor.nbytes for name, tensor in cache_tensors(source).items()}
    # what is not quantized is stored in bf16
    return sizes | {name: 2 * math.prod(source.structure.shapes[name]) for name in source.plain}


def _stored(source: ExportSource, name: str) -> Tensor:
    """Return the tensor stored under ``name``."""
    if name in source.plain:
        return exact_plain(source, name, torch.bfloat16)
    # their modules are attentions, which have no codes
    if name in (scales := cache_tensors(source)):
        return scales[name]
    module, part = name.rsplit(".", 1)
    it = layer(source, module)
    packed = source.state.activations is None
    # functions, so that only the requested part is computed
    make = {
        "weight_packed": lambda: pack_bits(it.codes, it.spec.bits) if it.spec.kind == "int" else pack_pairs(it.codes),
        "weight_scale": lambda: _scales(it, module),
        "weight_global_scale": lambda: source.state.global_scales[module].to(torch.float32).reshape(1),
        "weight_shape": lambda: torch.tensor(it.codes.shape, dtype=torch.int64),
        "weight_zero_point": lambda: _zero_points(it, packed),
        "weight": lambda: it.codes.contiguous(),
        "input_scale": lambda: source.state.input_scales[module].to(torch.float32).reshape(1),
        "input_global_scale": lambda: source.state.input_scales[module].to(torch.float32).reshape(1),
        "input_zero_point": lambda: source.state.input_zeros[module].to(torch.int8).reshape(1),
    }
    return make[part]()


def _scales(it: Layer, module: str) -> Tensor:
    if it.spec.kind in ("mxfp4", "nvfp4"):
        return exponent_bytes(it.scales) if it.spec.kind == "mxfp4" else e4m3_scales(it.scales)
    return exact_scales(it.scales, torch.bfloat16, NAME, module)


def _zero_points(it: Layer, packed: bool) -> Tensor:
    """Return zero points as stored: int8 [out, groups], or packed along the outputs."""
    assert it.zeros is not None
    # [out, groups] -> [groups, out] -> packed [groups, words] -> [words, groups]
    return pack_bits(it.zeros.T.contiguous(), it.spec.bits).T.contiguous() if packed else it.zeros.contiguous()
