"""Plain safetensors: a model folder that every stack loads without knowing of quantization.

Of a quantized folder the weights are codes times scales. Scales have bf16's 8 digits, so that bf16 holds the products of symmetric 2-bit
codes (powers of two) alone; fp16, with 11, those of up to 4 bits. Embeddings and norms lie on the bf16 grid, and fp16 does not hold their
small values. ``safetensors`` stores all in bf16 or in fp16 where one of them holds every value, else each tensor in the one that holds it,
and then config.json says float32; where neither holds some tensor, all in the one that changes fewer values, and the export is refused
unless inexact ones are allowed. ``safetensors-f32`` stores all in fp32, which holds everything.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.common.errors import UserError
from ...models.folder.codes_file import codes_file
from ..codes.state import load_quant_state
from ..source.plain_source import PlainSource, open_plain_source
from ..source.quantized_source import ExportSource
from .common import holds, plain_config
from .shards import plan_shards, write_shards

NAME, WIDE_NAME = "safetensors", "safetensors-f32"
_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class PlainWeights(PlainSource):
    """A checked folder whose weights, vectors included, are stored in ``dtype``, or each in a narrower one that holds it."""

    own: dict[str, torch.dtype] = field(default_factory=dict)
    """Dtypes of tensors that are not stored in ``dtype``."""

    def stored_dtype(self, name: str) -> torch.dtype:
        """What a weight is stored in."""
        return self.own.get(name, self.dtype)

    def tensor(self, name: str) -> Tensor:
        """A weight as it is stored; UserError when it is not finite, or not in its dtype any more."""
        dtype = self.stored_dtype(name)
        rounded = super().tensor(name).to(dtype)
        if not bool(torch.isfinite(rounded).all()):
            raise UserError(f"{self.plain[name]}: {name} has values beyond the range of {dtype}; export in another type")
        return rounded


def open_any_folder(folder: Path) -> PlainWeights:
    """Read and check a model folder, quantized or not, and choose 16-bit dtypes.

    Raises:
        UserError: as ``open_plain_source``; of a quantized folder also when its weights are not its codes times its scales.
    """
    source = open_wide_folder(folder)
    held = {name: [dtype for dtype in _DTYPES if holds(source.tensor(name), dtype)] for name in source.plain}
    for dtype in _DTYPES:
        if all(dtype in dtypes for dtypes in held.values()):
            return replace(source, dtype=dtype)
    if all(held.values()):
        return replace(source, own={name: dtypes[0] for name, dtypes in held.items()})
    return min((replace(source, dtype=dtype) for dtype in _DTYPES), key=_changed)


def open_wide_folder(folder: Path) -> PlainWeights:
    """Read and check a model folder, quantized or not, to be stored in fp32; UserError as ``open_any_folder``."""
    folder = Path(folder)
    if codes_file(folder):
        load_quant_state(folder)
    opened = open_plain_source(folder, torch.float32)
    # what is written is plain: the record of the codes stays with the folder that has them
    record = {key: value for key, value in opened.record.items() if key != "quant"}
    shared: dict[str, Any] = {"folder": folder, "config": opened.config, "record": record, "state": opened.state}
    shared |= {"structure": opened.structure, "plain": opened.plain, "names_in_files": opened.names_in_files}
    return PlainWeights(**shared, dtype=torch.float32)


def _changed(source: PlainWeights) -> int:
    """Elements that the dtype changes; one that is beyond its range is worse than any number of them."""
    try:
        return source.rounding().changed
    except UserError:
        if source.dtype == _DTYPES[0]:
            raise
        return source.structure.parameters + 1


def check(source: ExportSource) -> None:
    """Nothing: opening chose what holds the weights, or the least bad."""


def exported_config(source: ExportSource) -> dict[str, Any]:
    """``config.json`` of the export: the model's own with the stored dtype; no path of this machine, no code."""
    assert isinstance(source, PlainSource)
    return plain_config(source, source.dtype)


def planned_bytes(source: ExportSource) -> int:
    """Bytes of tensor data that ``write`` will store."""
    return sum(_sizes(source).values())


def write(folder: Path, source: ExportSource) -> None:
    """Write the weight files into ``folder``; UserError when a weight is beyond the range of the dtype."""
    write_shards(folder, plan_shards(_sizes(source)), lambda name: source.tensor(name).contiguous())


def _sizes(source: ExportSource) -> dict[str, int]:
    assert isinstance(source, PlainWeights)
    return {name: source.stored_dtype(name).itemsize * math.prod(source.structure.shapes[name]) for name in source.plain}
