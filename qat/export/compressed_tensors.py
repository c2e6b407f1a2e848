"""The compressed-tensors format "pack-quantized": integer codes in 32-bit words, bf16 scales, read by transformers, vLLM and SGLang.

Nothing is rounded here: codes and scales are those that training used. Scales lie on the bf16 grid and are stored as bf16; tensors
that are not quantized must lie on it too (a quantized folder's do). The package of that name is not needed to write.

Source: compressed-tensors ``compressors/pack_quantized/base.py``, ``quantization/quant_config.py``; transformers
``quantizers/quantizer_compressed_tensors.py``.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.errors import UserError
from ..packing import PACKED_BITS, pack_int32, packed_width
from ..spec import QuantSpec
from .shards import plan_shards, write_shards
from .source import ExportSource

NAME = "compressed-tensors"
LAYOUT_VERSION = "0.15.0"
"""The oldest package version that transformers 5 loads; 2, 4 and 8-bit layouts have not changed since."""
_PACKED, _SCALE, _SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"


def check(source: ExportSource) -> None:
    """Refuse what the format cannot hold exactly.

    Raises:
        UserError: a code width that readers disagree on, or scales that bf16 does not hold.
    """
    spec = source.state.spec
    if spec.bits not in PACKED_BITS:
        nearest = min((4, 8), key=lambda bits: (abs(bits - spec.bits), -bits))
        raise UserError(
            f"{NAME} cannot hold bits={spec.bits}: versions of the format pack 3, 5, 6 and 7 bits differently; "
            f"quantize with bits={nearest} (4 and 8 are read by every serving stack)"
        )
    if spec.scale_grid not in ("bf16_fp16", "bf16"):
        raise UserError(f"{NAME} stores scales in bf16, which does not hold scale_grid={spec.scale_grid!r}; quantize with 'bf16_fp16'")


def quantization_config(spec: QuantSpec, ignore: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``: one group for every linear but those of ``ignore``."""
    group_size = None if isinstance(spec.group_size, str) else spec.group_size
    weights = {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None, "format": "pack-quantized"}
    return {
        "quant_method": NAME,
        "version": LAYOUT_VERSION,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": {"group_0": group},
    }


def exported_config(source: ExportSource) -> dict[str, Any]:
    """``config.json`` of the export: the model's own, in bf16, with the packing described; no path of this machine, no code."""
    config = {key: value for key, value in source.config.items() if key not in ("torch_dtype", "_name_or_path", "auto_map")}
    config["dtype"] = "bfloat16"
    config["quantization_config"] = quantization_config(source.state.spec, source.unquantized_linears)
    return config


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
    """Bytes of every stored tensor, in the order of writing."""
    sizes: dict[str, int] = {}
    for module in source.state.modules:
        rows, columns = source.state.codes[module].shape
        sizes[module + _PACKED] = rows * packed_width(columns, source.state.spec.bits) * 4
        sizes[module + _SCALE] = source.state.scales[module].numel() * 2
        sizes[module + _SHAPE] = 2 * 8
    return sizes | {name: 2 * math.prod(source.structure.shapes[name]) for name in source.plain}


def _stored(source: ExportSource, name: str) -> Tensor:
    """The tensor that is stored under ``name``."""
    if name in source.plain:
        return _plain(source, name)
    module, part = name.rsplit(".", 1)
    if part == _PACKED[1:]:
        return pack_int32(source.state.codes[module], source.state.spec.bits)
    if part == _SCALE[1:]:
        return source.state.scales[module].to(torch.bfloat16)
    return torch.tensor(source.state.codes[module].shape, dtype=torch.int64)


def _plain(source: ExportSource, name: str) -> Tensor:
    tensor = source.tensor(name)
    rounded = tensor.to(torch.bfloat16)
    if not torch.equal(rounded.to(tensor.dtype), tensor):
        raise UserError(
            f"{source.plain[name]}: {name} has values that bf16 does not hold, so the export would not be the model that was "
            "measured; quantize the model again (the stages 'qat' and 'quantize' store such tensors on the bf16 grid)"
        )
    return rounded.contiguous()
