"""Fake quantization by given scales as Triton kernels; ``learned_reference.py`` is the spec.

``common_kernel.py`` explains why both give the same bits where they do.

A program handles a block of whole groups: one sweep forward, one sweep backward that writes the weight's gradient and sums the
scale's in registers, column block by column block. No atomics and no partial sums in memory: the order of the sum is fixed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common_kernel import (
    drop_bits,
    finite,
    from_memory,
    integer_grid,
    launch_kernel,
    masked_weights,
    nearest_integers,
    operands,
    to_memory,
)
from .learned_reference import back_inside


@triton.jit
def _given_scales(
    scale_ptr, rows, num_groups, DROPPED_BITS: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, SHARED: tl.constexpr
):
    """(fp32 [BLOCK_GROUPS] scales on their grid, 1 for broken ones; which are fine). SHARED: one scale for all groups."""
    # a stride of 0 gives every group the one shared scale
    raw = tl.load(scale_ptr + rows * (0 if SHARED else 1), mask=rows < num_groups, other=1.0)
    fine = finite(raw)
    scale = tl.where(fine, raw, 1.0)
    if DROPPED_BITS > 0:
        scale = drop_bits(scale, DROPPED_BITS)
    return tl.minimum(tl.maximum(scale, SMALLEST), LARGEST), fine


@triton.jit
def _zeros(zero_ptr, rows, num_groups, HAS_ZERO: tl.constexpr, SHARED: tl.constexpr):
    """fp32 [BLOCK_GROUPS] zero points; 0 without them."""
    zero = (rows * 0).to(tl.float32)
    if HAS_ZERO:
        zero = tl.load(zero_ptr + rows * (0 if SHARED else 1), mask=rows < num_groups, other=0).to(tl.float32)
    return zero


@triton.jit
def _forward_kernel(
    weight_ptr,  # [groups, WIDTH] fp32, fp16, or bf16 as int16
    mask_ptr,  # [groups, WIDTH] uint8
    scale_ptr,  # [groups] fp32, or one number
    zero_ptr,  # the same, int8
    result_ptr,  # [groups, WIDTH] weight's dtype (IS_CODES: int8)
    num_groups,
    SHARED: tl.constexpr,  # all groups share scale and zero point
    WIDTH: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    DROPPED_BITS: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    IS_CODES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    scale, fine = _given_scales(scale_ptr, rows, num_groups, DROPPED_BITS, SMALLEST, LARGEST, SHARED)
    zero = _zeros(zero_ptr, rows, num_groups, HAS_ZERO, SHARED)
    # the limits of q - z, by which the scale is multiplied; the stored code is (q - z) + z
    low, high = QMIN - zero, QMAX - zero
    for start in range(0, WIDTH, BLOCK_WIDTH):
        columns = start + tl.arange(0, BLOCK_WIDTH)
        valid = (rows[:, None] < num_groups) & (columns[None, :] < WIDTH)
        offsets = rows[:, None] * WIDTH + columns[None, :]
        x, _ = masked_weights(weight_ptr, mask_ptr, offsets, valid, HAS_MASK)
        whole = finite(x) & fine[:, None]
        value = tl.math.div_rn(tl.where(whole, x, 0.0), tl.broadcast_to(scale[:, None], x.shape))
        codes = nearest_integers(value, low[:, None], high[:, None])
        if IS_CODES:
            tl.store(result_ptr + offsets, (codes + zero[:, None]).to(tl.int8), mask=valid)
        else:
            result = codes * scale[:, None]
            if result_ptr.dtype.element_ty == tl.int16:
                # bf16: rounded here by integer arithmetic, so that ``to_memory`` only moves bits
                result = drop_bits(result, 16)
            result = tl.where(whole, result, float("nan"))
            tl.store(result_ptr + offsets, to_memory(result, result_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _residual(codes, inside_x, scale, DROPPED_BITS: tl.constexpr):
    """codes * scale - inside_x, exact as a rule: codes * scale is, for scales of few bits; others go in two halves."""
    if DROPPED_BITS > 0:
        left = codes * scale - inside_x
    else:
        # clearing 12 bits leaves 12 of 24 significant ones, whose product with a code of at most 9 bits is exact in fp32
        high = (scale.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
        left = (codes * high - inside_x) + codes * (scale - high)
    return left


@triton.jit
def _gradient_kernel(
    grad_ptr,  # [groups, WIDTH] weight's dtype
    weight_ptr,  # [groups, WIDTH]
    mask_ptr,  # [groups, WIDTH] uint8
    scale_ptr,  # [groups] fp32, or one number
    zero_ptr,  # the same, int8
    result_ptr,  # [groups, WIDTH] weight's dtype, written when FOR_WEIGHT
    scale_grad_ptr,  # [groups] fp32, written when FOR_SCALE
    num_groups,
    FACTOR,  # fp32
    SHARED: tl.constexpr,  # all groups share scale and zero point
    WIDTH: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    DROPPED_BITS: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    FOR_WEIGHT: tl.constexpr,
    FOR_SCALE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    scale, fine = _given_scales(scale_ptr, rows, num_groups, DROPPED_BITS, SMALLEST, LARGEST, SHARED)
    zero = _zeros(zero_ptr, rows, num_groups, HAS_ZERO, SHARED)
    low, high = QMIN - zero, QMAX - zero
    # one sum per column of the block, added up after the loop: the order never changes
    sums = tl.zeros([BLOCK_GROUPS, BLOCK_WIDTH], tl.float32)
    for start in range(0, WIDTH, BLOCK_WIDTH):
        columns = start + tl.arange(0, BLOCK_WIDTH)
        valid = (rows[:, None] < num_groups) & (columns[None, :] < WIDTH)
        offsets = rows[:, None] * WIDTH + columns[None, :]
        x, keep = masked_weights(weight_ptr, mask_ptr, offsets, valid, HAS_MASK)
        whole = finite(x) & fine[:, None]
        x = tl.where(whole, x, 0.0)
        value = tl.math.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        inside = whole & (value >= low[:, None]) & (value <= high[:, None])
        grad = from_memory(tl.load(grad_ptr + offsets, mask=valid, other=0))
        if FOR_WEIGHT:
            result = grad * tl.where(inside, keep, 0.0)
            tl.store(result_ptr + offsets, to_memory(result, result_ptr.dtype.element_ty), mask=valid)
        if FOR_SCALE:
            codes = nearest_integers(value, low[:, None], high[:, None])
            left = _residual(codes, tl.where(inside, x, 0.0), scale[:, None], DROPPED_BITS)
            # a NaN weight or scale reaches the scale's gradient; columns beyond WIDTH are padding and add 0
            left = tl.where(whole | (columns[None, :] >= WIDTH), left, float("nan"))
            sums += grad * left
    if FOR_SCALE:
        # sum of (c s - w), divided by s once: see ``learned_reference.py``
        total = tl.math.div_rn(tl.sum(sums, axis=1), scale) * FACTOR
        # as ``back_inside``; a shared scale is judged after its groups are added up, by ``fake_quant_gradient``
        if not SHARED:
            raw = tl.load(scale_ptr + rows, mask=rows < num_groups, other=1.0)
            outwards = ((raw < SMALLEST) & (total > 0.0)) | ((raw > LARGEST) & (total < 0.0))
            total = tl.where(outwards, 0.0, total)
        tl.store(scale_grad_ptr + rows, total, mask=rows < num_groups)


def _arguments(mask: Tensor | None, zeros: Tensor | None, scale: Tensor) -> tuple[Tensor, dict[str, bool]]:
    """Zero points (or a stand-in that is never read) and the flags that both kernels take."""
    flags = {"HAS_MASK": mask is not None, "HAS_ZERO": zeros is not None, "SHARED": scale.numel() == 1}
    return scale if zeros is None else zeros.contiguous(), flags


def _forward(
    weight: Tensor, scale: Tensor, mask: Tensor | None, zeros: Tensor | None, bits: int, width: int, grid: list[float], codes: bool
) -> Tensor:  # fmt: skip
    weight, mask_bytes = operands(weight, mask)
    scale = scale.detach().contiguous()
    zero, flags = _arguments(mask, zeros, scale)
    result = torch.empty(weight.shape, dtype=torch.int8 if codes else weight.dtype, device=weight.device)
    tensors = [weight, mask_bytes, scale, zero, result]
    launch_kernel(_forward_kernel, tensors, weight, width, **integer_grid(bits, grid), IS_CODES=codes, **flags)
    return result


def quantize(
    weight: Tensor, scale: Tensor, mask: Tensor | None, zeros: Tensor | None, bits: int, width: int, grid: list[float]
) -> Tensor:  # fmt: skip
    """Codes int8 [out, in], zero points included; codes of NaN weights are arbitrary."""
    return _forward(weight, scale, mask, zeros, bits, width, grid, True)


@torch.library.custom_op("decoct::fake_quant_learned_triton", mutates_args=())
def fake_quant(
    weight: Tensor, scale: Tensor, mask: Tensor | None, zeros: Tensor | None, bits: int, width: int, grid: list[float], factor: float
) -> Tensor:  # fmt: skip
    """y [out, in] in the weight's dtype."""
    return _forward(weight, scale, mask, zeros, bits, width, grid, False)


@torch.library.custom_op("decoct::fake_quant_learned_triton_gradient", mutates_args=())
def fake_quant_gradient(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    width: int,
    grid: list[float],
    factor: float,
    for_weight: bool,
    for_scale: bool,
) -> tuple[Tensor, Tensor]:
    """(dL/dw [out, in] in the weight's dtype, dL/dscale fp32 in the scale's shape); a gradient that is not needed is empty."""
    weight, mask_bytes = operands(weight, mask)
    raw = scale.detach().contiguous()
    zero, flags = _arguments(mask, zeros, raw)
    groups = weight.numel() // width
    weight_grad = torch.empty(weight.shape if for_weight else (0,), dtype=weight.dtype, device=weight.device)
    sums = torch.empty(groups if for_scale else 0, dtype=torch.float32, device=weight.device)
    tensors = [grad.contiguous(), weight, mask_bytes, raw, zero, weight_grad, sums]
    flags |= {"FOR_WEIGHT": for_weight, "FOR_SCALE": for_scale}
    launch_kernel(_gradient_kernel, tensors, weight, width, (factor,), **integer_grid(bits, grid), **flags)
    if not for_scale:
        return weight_grad, sums
    if flags["SHARED"]:
        # one number for the whole matrix: summed in fp64, then rounded to fp32 once
        sums = back_inside(sums.sum(dtype=torch.float64).to(torch.float32).view(scale.shape), raw, grid)
    return weight_grad, sums.view(scale.shape)


@fake_quant.register_fake
def _(
    weight: Tensor, scale: Tensor, mask: Tensor | None, zeros: Tensor | None, bits: int, width: int, grid: list[float], factor: float
) -> Tensor:  # fmt: skip
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


@fake_quant_gradient.register_fake
def _(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    width: int,
    grid: list[float],
    factor: float,
    for_weight: bool,
    for_scale: bool,
) -> tuple[Tensor, Tensor]:
    weight_grad = torch.empty(weight.shape if for_weight else (0,), dtype=weight.dtype, device=weight.device)
    return weight_grad, torch.empty(scale.shape if for_scale else (0,), dtype=torch.float32, device=weight.device)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.bits, ctx.width, ctx.grid, ctx.factor = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    for_weight, for_scale = ctx.needs_input_grad[:2]
    numbers = (ctx.bits, ctx.width, ctx.grid, ctx.factor)
    weight_grad, scale_grad = fake_quant_gradient(grad, *ctx.saved_tensors, *numbers, for_weight, for_scale)
    return (weight_grad if for_weight else None, scale_grad if for_scale else None, *[None] * 6)


fake_quant.register_autograd(_backward, setup_context=_save)
