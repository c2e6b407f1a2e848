"""Scales and zero points from the range of each group, or of the whole tensor, in plain PyTorch: the specification of ``range_kernel.py``.

With low = min(w * mask, 0) and high = max(w * mask, 0), so that zero is a code (fp32 arithmetic; fp64 weights stay fp64):

    asymmetric    s = clamp(round_to_grid((high - low) / (2^b - 1)), smallest, largest)     s = 1 where high = low = 0
                  z = clamp(round_half_even(qmin - low / s), qmin, qmax)                     w ~ (q - z) * s
    symmetric     s from max(high, -low) / divisor as in ``absmax_reference.py``; z = 0

``learned_reference.py`` then computes codes and values with these scales and zero points. A NaN or infinite weight makes the scale of its
group NaN.

Source: Jacob et al., arXiv 1712.05877, eq. 1 (integer zero point). The numbers are those of compressed-tensors' min-max observer, except
that s is rounded to its grid before z and the codes are computed.
"""

import torch
from torch import Tensor

from .absmax_reference import code_limits, group_scales


def grid_of_range(
    low: Tensor, high: Tensor, bits: int, symmetric: bool, divisor: float, grid: list[float]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(scales fp32, zero points int8) of ranges low <= 0 <= high, any shape."""
    numbers = (divisor, int(grid[0]), grid[1], grid[2])
    if symmetric:
        scale = group_scales(torch.maximum(high, -low), *numbers)
        return scale.to(torch.float32), torch.zeros_like(scale, dtype=torch.int8)
    # clamped, because the difference of two finite numbers may overflow
    scale = group_scales((high - low).clamp(max=torch.finfo(high.dtype).max), *numbers)
    qmin, qmax = code_limits(bits)
    # from the scale on its grid, which is the one that is stored
    zeros = (qmin - low / scale).clamp_(qmin, qmax).round_().nan_to_num_(0.0)
    # NaN where low or high is not finite; as they differ in sign, the sum of finite ones cannot overflow
    return scale.add_((low + high) * 0.0).to(torch.float32), zeros.to(torch.int8)


def group_range(weight: Tensor, mask: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """(low, high) [groups] in compute dtype."""
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    kept = weight.to(compute)
    if mask is not None:
        kept = kept * mask.view(torch.uint8).to(compute)
    # [out, in] -> [out * groups, width] -> [out * groups]
    low, high = kept.reshape(-1, width).aminmax(dim=1)
    return low.clamp_(max=0.0), high.clamp_(min=0.0)


def shared_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The range of all groups together as (low, high) [1]; (0, 0) for an empty tensor."""
    nothing = low.new_zeros(1)
    return torch.cat([low, nothing]).amin(0, keepdim=True), torch.cat([high, nothing]).amax(0, keepdim=True)


def group_shape(weight: Tensor, width: int, shared: bool) -> tuple[int, int]:
    """Shape of scales and zero points: [out, groups], or [1, 1] if shared."""
    return (1, 1) if shared else (weight.shape[0], weight.shape[1] // width)


# A custom op, so that no compiler removes the cast to the grid and back.
@torch.library.custom_op("decoct::range_grid_reference", mutates_args=())
def range_grid_op(
    weight: Tensor, mask: Tensor | None, bits: int, width: int, shared: bool, symmetric: bool, divisor: float, grid: list[float]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(scales fp32, zero points int8) of weights [out, in], both [out, groups], or [1, 1] if shared; bad groups have NaN scales."""
    low, high = group_range(weight, mask, width)
    if shared:
        low, high = shared_range(low, high)
    scale, zeros = grid_of_range(low, high, bits, symmetric, divisor, grid)
    shape = group_shape(weight, width, shared)
    return scale.view(shape), zeros.view(shape)


@range_grid_op.register_fake
def _(
    weight: Tensor, mask: Tensor | None, bits: int, width: int, shared: bool, symmetric: bool, divisor: float, grid: list[float]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = group_shape(weight, width, shared)
    device = weight.device
    return torch.empty(shape, dtype=torch.float32, device=device), torch.empty(shape, dtype=torch.int8, device=device)
