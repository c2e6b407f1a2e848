"""A model folder, quantized or not, as the source of plain safetensors: every weight in a dtype that holds it, if there is one."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.common.errors import UserError
from ...models.folder.codes_file import codes_file
from ..codes.state import load_quant_state
from .plain_source import PlainSource, open_plain_source
from .quantized_source import Load

_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class PlainWeights(PlainSource):
    """A checked folder whose weights, vectors included, are stored in ``dtype``, or each in a narrower one that holds it."""

    own: dict[str, torch.dtype] = field(default_factory=dict)
    """Dtypes of tensors that are not stored in ``dtype``."""

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a weight is stored."""
        return self.own.get(name, self.dtype)

    def tensor(self, name: str) -> Tensor:
        """Return a weight as stored; UserError if it is not finite, or overflows in its dtype."""
        return self._in_range(name, super().tensor(name).to(self.stored_dtype(name)))


def open_any_folder(folder: Path, load: Load = load_quant_state) -> PlainWeights:
    """Read and check a model folder, quantized or not, and choose 16-bit dtypes.

    Args:
        folder: The model folder.
        load: Reads and proves its codes, if it has any.

    Raises:
        UserError: as ``open_plain_source``; for a quantized folder also if its weights are not codes times scales.
    """
    source = open_wide_folder(folder, load)
    # the 16-bit dtypes that hold each tensor exactly
    held = {name: _exact_dtypes(source.tensor(name)) for name in source.plain}
    for dtype in _DTYPES:
        if all(dtype in dtypes for dtypes in held.values()):
            return replace(source, dtype=dtype)
    # each tensor in the first dtype that holds it, since no single one holds all
    if all(held.values()):
        return replace(source, own={name: dtypes[0] for name, dtypes in held.items()})
    # neither dtype holds everything: the one that changes fewer values
    return min((replace(source, dtype=dtype) for dtype in _DTYPES), key=_changed)


def _exact_dtypes(tensor: Tensor) -> list[torch.dtype]:
    return [dtype for dtype in _DTYPES if holds(tensor, dtype)]


def open_wide_folder(folder: Path, load: Load = load_quant_state) -> PlainWeights:
    """Read and check a model folder, quantized or not, for storing in fp32; UserError as ``open_any_folder``."""
    folder = Path(folder)
    # a quantized folder is proven first: its weights are codes times scales
    if codes_file(folder):
        load(folder)
    opened = open_plain_source(folder, torch.float32)
    shared: dict[str, Any] = {"folder": folder, "config": opened.config, "record": opened.record, "state": opened.state}
    shared |= {"structure": opened.structure, "plain": opened.plain, "names_in_files": opened.names_in_files}
    return PlainWeights(**shared, dtype=torch.float32)


def _changed(source: PlainWeights) -> int:
    """Return the number of elements that the dtype changes; an overflow counts as more than all elements."""
    try:
        return source.rounding().changed
    except UserError:
        # bf16 has the range of fp32: an overflow there means a weight that no 16-bit float can hold
        if source.dtype == _DTYPES[0]:
            raise
        return source.structure.parameters + 1


def holds(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether ``dtype`` holds every value of a float tensor exactly."""
    return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)
