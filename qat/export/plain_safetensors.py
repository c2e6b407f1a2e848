"""Plain safetensors: a model folder that every stack loads without support for quantization.

The weights of a quantized folder are codes times scales. Scales have the 8 significant bits of bf16, so bf16 holds only products with
symmetric 2-bit codes (powers of two); fp16, with 11 significant bits, holds those of up to 4 bits. Embeddings and norms are on the bf16
grid, and fp16 does not hold their small values. ``safetensors`` stores all tensors in bf16 or in fp16 if one of them holds every value;
else each tensor in the one that holds it, and config.json names float32. If neither holds some tensor, all are stored in the one that
changes fewer values, and the export is refused unless ``allow_inexact`` is set. ``safetensors-f32`` stores all in fp32, which holds
everything.
"""

import math
from pathlib import Path
from typing import Any

from ..source.plain_source import PlainSource
from ..source.plain_weights import PlainWeights
from ..source.quantized_source import ExportSource
from .common import unquantized_config
from .shards import plan_shards, write_shards


def exported_config(source: ExportSource) -> dict[str, Any]:
    """Return the export's ``config.json``: the model's own with the stored dtype, without paths and code."""
    assert isinstance(source, PlainSource)
    return unquantized_config(source, source.dtype)


def planned_bytes(source: ExportSource) -> int:
    """Bytes of tensor data that ``write`` will store."""
    return sum(_sizes(source).values())


def write(folder: Path, source: ExportSource) -> None:
    """Write the weight files into ``folder``; UserError when a weight is beyond the range of the dtype."""
    write_shards(folder, plan_shards(_sizes(source)), lambda name: source.tensor(name).contiguous())


def _sizes(source: ExportSource) -> dict[str, int]:
    assert isinstance(source, PlainWeights)
    return {name: source.stored_dtype(name).itemsize * math.prod(source.structure.shapes[name]) for name in source.plain}
