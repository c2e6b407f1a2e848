"""Sums over everything that is cut together, as the axis map says."""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..axis_map import Axis, Family
from ..sizes import Sizes
from .structured import part_width

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def reduced(model: "PreTrainedModel", family: Family, sizes: Sizes, axis: Axis, elements: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Sums of ``elements(parameter)`` over all that belongs to each index of an axis.

    Args:
        model: The model; tied tensors count once.
        family: Its axis map.
        sizes: Its sizes.
        axis: ffn, heads, kv_heads or hidden. A key/value head has its query heads too.
        elements: One number per element of a parameter, fp64, of its shape.

    Returns:
        Per layer a tensor [size of the axis], on the CPU; for ``hidden`` last the one of what is outside the layers.
    """
    sums = [torch.zeros(sizes.of(axis), dtype=torch.float64) for _ in range(sizes.layers + 1)]
    for name, parameter in model.named_parameters():
        layer, _ = family.place(name)
        if not family.cuts(name, [axis, *(["heads"] if axis == "kv_heads" else [])]):
            continue
        numbers = elements(parameter)
        for dim, axes in enumerate(family.entry(name) or ()):
            sums[-1 if layer is None else layer] += _along(numbers, dim, axes, axis, sizes)
    return sums if axis == "hidden" else sums[:-1]


def _along(numbers: Tensor, dim: int, axes: str, axis: Axis, sizes: Sizes) -> Tensor:
    """Sum [size of the axis] over the parts of one dimension that are along ``axis``; zeros if none are."""
    total = torch.zeros(sizes.of(axis), dtype=torch.float64)
    parts = axes.split("+")
    if not {axis, "heads" if axis == "kv_heads" else axis} & set(parts):
        return total
    # [length of the dimension]: the sum over all others
    others = [other for other in range(numbers.ndim) if other != dim]
    line = (numbers.sum(others) if others else numbers).cpu()
    widths = [part_width(part, sizes) for part in parts]
    for part, start, width in zip(parts, itertools.accumulate(widths, initial=0), widths):
        if part == axis or (part, axis) == ("heads", "kv_heads"):
            # consecutive rows: the channels of a head, or all heads of a group
            total += line[start : start + width].view(sizes.of(axis), -1).sum(1)
    return total
