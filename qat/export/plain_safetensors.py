"""Plain safetensors: a model folder that every stack loads without knowing of quantization.

Of a quantized folder the weights are codes times scales. Scales have bf16's 8 digits, so that bf16 holds the products of symmetric 2-bit
codes (powers of two) alone; fp16, with 11, those of up to 4 bits. Embeddings and norms lie on the bf16 grid, and fp16 does not hold their
small values. ``safetensors`` stores all in bf16 or in fp16 where one of them holds every value, else each tensor in the one that holds it,
and then config.json says float32; where neither holds some tensor, all in the one that changes fewer values, and the export is refused
unless inexact ones are allowed. ``safetensors-f32`` stores all in fp32, which holds everything.
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
    """``config.json`` of the export: the model's own with the stored dtype; no path of this machine, no code."""
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
