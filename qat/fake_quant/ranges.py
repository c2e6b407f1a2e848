"""Scales and zero points computed from the weights, for asymmetric specs and for one scale per tensor."""

import torch
from torch import Tensor

from ..fake_quant import range_reference
from ..spec import QuantSpec
from .dispatch import check_weight, grid_numbers, use_kernel


@torch.no_grad()
def range_grid(weight: Tensor, spec: QuantSpec, mask: Tensor | None, backend: str) -> tuple[Tensor, Tensor | None]:
    """(scales fp32, zero points int8 or None if the spec is symmetric) of ``spec.scale_shape(out, in)``, without gradients.

    Groups with NaN or infinite weights have NaN scales. The formulas are in ``range_reference.py``.
    """
    check_weight(weight, mask)
    shared = spec.group_size == "tensor"
    width = spec.group_width(weight.shape[1])
    arguments = (mask, spec.code_bits, width, shared, spec.symmetric, spec.divisor_value, grid_numbers(spec))
    # the kernel has no symmetric form for groups (``absmax_kernel.py`` finds those scales itself): the reference gives them on a GPU too
    if use_kernel(weight, backend) and (shared or not spec.symmetric):
        from ..fake_quant import range_kernel

        scale, zeros = range_kernel.range_grid_op(weight.detach(), *arguments)
    else:
        scale, zeros = range_reference.range_grid_op(weight.detach(), *arguments)
    return scale, None if spec.symmetric else zeros


def check_groups(scales: Tensor) -> None:
    """Raises ValueError, naming the first group, if scales are NaN, as those of NaN or infinite weights (it waits for the device)."""
    # group_scales and grid_of_range mark groups with NaN or infinite weights by a scale of NaN
    broken = torch.isnan(scales)
    if bool(broken.any()):
        row, group = (int(i) for i in broken.nonzero()[0])
        raise ValueError(f"{int(broken.sum())} of {scales.numel()} groups hold NaN or infinite weights, first row {row} group {group}")
