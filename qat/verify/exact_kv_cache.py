"""Compares the scales of keys and values in an export with its source and its record."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..readers.compressed_tensors import PackedFolder
from ..readers.open import ExportReader

if TYPE_CHECKING:
    from ..source.quantized_source import ExportSource


def cache_of(opened: ExportReader) -> dict[str, float]:
    """Return scales by ``<attention module>.k`` and ``.v``; {} if keys and values are not rounded. UserError if they are damaged."""
    return (opened.cache() or {}) if isinstance(opened, PackedFolder) else {}


def cache_differences(opened: ExportReader, source: "ExportSource") -> list[str]:
    """Return a sentence for each scale of keys and values that differs from the source; [] if none does."""
    stored = source.state.cache
    wanted = {} if stored is None else {name: float(scale) for name, scale in stored.scales.items()}
    found = cache_of(opened)
    return [
        f"{name}_scale is {found.get(name, 'missing')}, not the source's ({wanted.get(name, 'it has none')})"
        # scales on either side alone count as differences
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]


def cache_values(opened: ExportReader) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Return fp32 [2] by attention module, its scales of keys and values, for hashing."""
    scales = cache_of(opened)
    attentions = dict.fromkeys(name.rpartition(".")[0] for name in scales)
    return {name: np.array([scales[f"{name}.k"], scales[f"{name}.v"]], np.float32) for name in attentions}
