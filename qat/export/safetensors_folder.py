"""Plain safetensors in bf16 or fp16: a model folder that every stack loads without knowing of quantization.

Of a quantized folder the weights are codes times scales. Scales have bf16's 8 digits, so that bf16 holds the products of symmetric 2-bit
codes (powers of two) alone; fp16, with 11, those of up to 4 bits. The dtype is the first of bf16 and fp16 that holds every value; when
neither does, the one that changes fewer values, and then the export is refused unless inexact ones are allowed.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.codes_file import codes_file
from ...models.errors import UserError
from ...models.folder import read_record
from ..state import load_quant_state
from .lattice import plain_config
from .plain_source import PlainSource, open_plain_source
from .shards import plan_shards, write_shards
from .source import ExportSource

NAME = "safetensors"
_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class PlainWeights(PlainSource):
    """A checked folder whose weights, vectors included, are stored in ``dtype``."""

    def tensor(self, name: str) -> Tensor:
        """A weight in ``dtype``; UserError when it is not finite, or not in ``dtype`` any more."""
        rounded = super().tensor(name).to(self.dtype)
        if not bool(torch.isfinite(rounded).all()):
            raise UserError(f"{self.plain[name]}: {name} has values beyond the range of {self.dtype}; export in another type")
        return rounded


def open_any_folder(folder: Path) -> PlainWeights:
    """Read and check a model folder, quantized or not, and choose the dtype.

    Raises:
        UserError: as ``open_plain_source``; of a quantized folder also when its weights are not its codes times its scales.
    """
    folder = Path(folder)
    if codes_file(folder):
        load_quant_state(folder)
    opened = open_plain_source(folder, _DTYPES[0])
    # what is written is plain: the record of the codes stays with the folder that has them
    record = {key: value for key, value in read_record(folder).items() if key != "quant"}
    shared = {"folder": folder, "config": opened.config, "record": record, "state": opened.state}
    tried = [PlainWeights(**shared, structure=opened.structure, plain=opened.plain, dtype=dtype) for dtype in _DTYPES]
    changed: dict[torch.dtype, int] = {}
    for source in tried:
        changed[source.dtype] = _changed(source)
        if not changed[source.dtype]:
            return source
    return min(tried, key=lambda source: changed[source.dtype])


def _changed(source: PlainWeights) -> int:
    """Elements that the dtype changes; one that is beyond its range is worse than any number of them."""
    try:
        return source.rounding().changed
    except UserError:
        if source.dtype == _DTYPES[0]:
            raise
        return source.structure.parameters + 1


def check(source: ExportSource) -> None:
    """Nothing: ``open_any_folder`` chose what holds the weights, or the least bad."""


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
    return {name: 2 * math.prod(source.structure.shapes[name]) for name in source.plain}
