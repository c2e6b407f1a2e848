"""Folds a scale per channel into the producer and the readers of a coupling (``models.couplings``), in fp64, so that it changes nothing."""

import torch
from torch import Tensor, nn

from ...models.axis_map import Family
from ...models.couplings import Coupling

STORED = torch.bfloat16
"""Dtype in which norms are stored after rounding."""


def dimensions(family: Family, module: str) -> tuple[int, int]:
    """(dimension of the outputs, dimension of the inputs) of a matrix of a layer: (0, 1), or (1, 0) of a Conv1D."""
    return (0, 1) if family.layer[f"{module}.weight"] == family.matrices[module] else (1, 0)


def channels(family: Family, coupling: Coupling, layer: nn.Module) -> int:
    """Channels of the producer that have a scale: as many as the readers have inputs, each as often as it is read."""
    reader = coupling.readers[0]
    return layer.get_parameter(f"{reader}.weight").shape[dimensions(family, reader)[1]] // coupling.group


def per_reader(scales: Tensor, coupling: Coupling) -> Tensor:
    """The scales [n] of the producer for the inputs of a reader [n * group]: each head of values for all query heads that read it."""
    return scales.reshape(-1, 1, coupling.block).expand(-1, coupling.group, -1).reshape(-1)


def by_channel(inputs: Tensor, coupling: Coupling) -> Tensor:
    """[n, group]: numbers of the inputs of a reader [n * group], those of one channel of the producer side by side."""
    return inputs.reshape(-1, coupling.group, coupling.block).transpose(1, 2).reshape(-1, coupling.group)


@torch.no_grad()
def stored_scales(scales: Tensor, gain: Tensor, offset: float) -> Tensor:
    """The scales next to ``scales`` with which the norm's new weight is a number of bf16, so that storing it changes nothing.

    Without this a gain of 1 + w near 0 would lose most of its bits: bf16 keeps eight of w.

    Args:
        scales: fp64 [n], positive.
        gain: fp64 [n]: the norm's weight plus ``offset``.
        offset: What the family's code adds to the weight.
    """
    settled = (gain / scales - offset).to(STORED).to(torch.float64) + offset
    found = gain / settled
    # a gain of 0 passes nothing on, and one that would become 0 or turn its sign is left
    return torch.where((gain == 0) | (settled == 0) | (found <= 0), torch.ones_like(found), found)


@torch.no_grad()
def fold_scales(layer: nn.Module, family: Family, coupling: Coupling, scales: Tensor) -> Tensor:
    """Divides the producer's outputs by the scales and multiplies the readers' inputs by them; returns the scales that were used.

    Args:
        layer: A decoder layer, in place.
        family: Its axis map.
        coupling: The producer and its readers.
        scales: fp64 [n], positive, finite.
    """
    producer = layer.get_submodule(coupling.producer)
    weight, bias = layer.get_parameter(f"{coupling.producer}.weight"), getattr(producer, "bias", None)
    if coupling.norm:
        gain = weight.to(torch.float64) + family.norm_offset
        scales = stored_scales(scales, gain, family.norm_offset)
        weight.copy_(gain / scales - family.norm_offset)
        if bias is not None:
            bias.copy_(bias / scales)
    else:
        # the last part of a fused matrix
        rows = weight if dimensions(family, coupling.producer)[0] == 0 else weight.T
        rows = rows[-len(scales) :]
        rows.copy_(rows / scales[:, None])
        if bias is not None:
            bias[-len(scales) :] = bias[-len(scales) :] / scales
    each = per_reader(scales, coupling)
    for reader in coupling.readers:
        read = layer.get_parameter(f"{reader}.weight")
        columns = read if dimensions(family, reader)[1] == 1 else read.T
        columns.copy_(columns * each)
    return scales
