"""Scales and zero points from the range of each group as a Triton kernel; ``range_reference.py`` is the spec.

Minimum and maximum are taken over integers that order as the fp32 numbers do, NaN beyond the infinities of its sign. The range of
a whole tensor is that of its rows, put together by PyTorch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common_kernel import drop_bits, integer_grid, launch_kernel, masked_weights, nearest_integers, operands
from .range_reference import grid_of_range, group_shape, shared_range

_LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _ordered(bits):
    """int32 bits of fp32 -> integers in the order of the numbers, and back; -0 is just below +0."""
    # negative numbers have all bits but the sign flipped: a larger magnitude becomes a smaller integer
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _range_kernel(
    weight_ptr,  # [groups, WIDTH] fp32, fp16, or bf16 as int16
    mask_ptr,  # [groups, WIDTH] uint8
    first_ptr,  # [groups] fp32: scales, or low when IS_RANGE
    zero_ptr,  # [groups] int8: zero points, written unless IS_RANGE
    high_ptr,  # [groups] fp32, written when IS_RANGE
    num_groups,
    DIVISOR: tl.constexpr,
    WIDTH: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    DROPPED_BITS: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    HAS_MASK: tl.constexpr,
    IS_RANGE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    # both ends start at 0, whose key is 0, so the range contains zero
    least = tl.zeros([BLOCK_GROUPS], tl.int32)
    most = tl.zeros([BLOCK_GROUPS], tl.int32)
    for start in range(0, WIDTH, BLOCK_WIDTH):
        columns = start + tl.arange(0, BLOCK_WIDTH)
        valid = (rows[:, None] < num_groups) & (columns[None, :] < WIDTH)
        x, _ = masked_weights(weight_ptr, mask_ptr, rows[:, None] * WIDTH + columns[None, :], valid, HAS_MASK)
        key = _ordered(x.to(tl.int32, bitcast=True))
        least = tl.minimum(least, tl.min(key, axis=1))
        most = tl.maximum(most, tl.max(key, axis=1))
    # the bits of infinity, and what those of minus infinity become
    fine = (most < 0x7F800000) & (least > -2139095041)
    low = _ordered(tl.where(fine, least, 0)).to(tl.float32, bitcast=True)
    high = _ordered(tl.where(fine, most, 0)).to(tl.float32, bitcast=True)
    inside = rows < num_groups
    if IS_RANGE:
        tl.store(first_ptr + rows, tl.where(fine, low, float("nan")), mask=inside)
        tl.store(high_ptr + rows, tl.where(fine, high, float("nan")), mask=inside)
    else:
        # the difference of two finite numbers may overflow
        width = tl.minimum(high - low, _LARGEST_FLOAT)
        scale = tl.math.div_rn(width, tl.full([BLOCK_GROUPS], DIVISOR, tl.float32))
        if DROPPED_BITS > 0:
            scale = drop_bits(scale, DROPPED_BITS)
        scale = tl.minimum(tl.maximum(scale, SMALLEST), LARGEST)
        # law 3, docs/architecture.md: a group of zeros has s = 1
        scale = tl.where(width == 0.0, 1.0, scale)
        # from the scale on its grid, which is the one that is stored
        zero = nearest_integers(QMIN - tl.math.div_rn(low, scale), QMIN, QMAX)
        tl.store(first_ptr + rows, tl.where(fine, scale, float("nan")), mask=inside)
        tl.store(zero_ptr + rows, tl.where(fine, zero, 0.0).to(tl.int8), mask=inside)


@torch.library.custom_op("decoct::range_grid_triton", mutates_args=())
def range_grid_op(
    weight: Tensor, mask: Tensor | None, bits: int, width: int, shared: bool, symmetric: bool, divisor: float, grid: list[float]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(scales fp32, zero points int8) of weights [out, in]; symmetric ones only when shared (``absmax_kernel.py`` has the groups)."""
    weight, mask_bytes = operands(weight, mask)
    groups = weight.numel() // width
    first = torch.empty(groups, dtype=torch.float32, device=weight.device)
    second = torch.empty(groups, dtype=torch.float32 if shared else torch.int8, device=weight.device)
    # ``second`` is zero_ptr and high_ptr at once: the kernel writes the one that IS_RANGE selects
    tensors = [weight, mask_bytes, first, second, second]
    flags = {"HAS_MASK": mask is not None, "IS_RANGE": shared}
    launch_kernel(_range_kernel, tensors, weight, width, **integer_grid(bits, grid), DIVISOR=divisor, **flags)
    if shared:
        first, second = grid_of_range(*shared_range(first, second), bits, symmetric, divisor, grid)
    shape = group_shape(weight, width, shared)
    return first.view(shape), second.view(shape)


@range_grid_op.register_fake
def _(
    weight: Tensor, mask: Tensor | None, bits: int, width: int, shared: bool, symmetric: bool, divisor: float, grid: list[float]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = group_shape(weight, width, shared)
    device = weight.device
    return torch.empty(shape, dtype=torch.float32, device=device), torch.empty(shape, dtype=torch.int8, device=device)
