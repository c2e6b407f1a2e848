"""The fake-quant op as Triton kernels: the weight is read once and written once, and nothing is kept for the backward.

``absmax_reference.py`` is the spec; ``common_kernel.py`` explains why both give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common_kernel import drop_bits, from_memory, integer_grid, launch_kernel, masked_weights, nearest_integers, operands, to_memory


@triton.jit
def _scales(
    weight_ptr,  # [groups, WIDTH] fp32, fp16, or bf16 as int16 (so all numbers below)
    mask_ptr,  # [groups, WIDTH] uint8, or anything when HAS_MASK is false
    rows,  # int64 [BLOCK_GROUPS] group numbers of this program
    num_groups,
    WIDTH: tl.constexpr,
    DIVISOR: tl.constexpr,
    DROPPED_BITS: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """fp32 [BLOCK_GROUPS] scales on their grid; 1 for zero groups, NaN for groups with a NaN or an infinity."""
    largest = tl.zeros([BLOCK_GROUPS], tl.int32)
    # first sweep over a group: its largest magnitude
    for start in range(0, WIDTH, BLOCK_WIDTH):
        columns = start + tl.arange(0, BLOCK_WIDTH)
        valid = (rows[:, None] < num_groups) & (columns[None, :] < WIDTH)
        x, _ = masked_weights(weight_ptr, mask_ptr, rows[:, None] * WIDTH + columns[None, :], valid, HAS_MASK)
        # without the sign bit, fp32 numbers order as their bits do; NaN and infinity come out on top
        magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, tl.max(magnitude, axis=1))
    # any finite stand-in will do where the result is replaced below
    finite = tl.where(largest >= 0x7F800000, 0, largest)
    # div_rn: ``/`` may be approximate in fp32 and give other bits than the reference
    scale = tl.math.div_rn(finite.to(tl.float32, bitcast=True), tl.full([BLOCK_GROUPS], DIVISOR, tl.float32))
    if DROPPED_BITS > 0:
        scale = drop_bits(scale, DROPPED_BITS)
    scale = tl.minimum(tl.maximum(scale, SMALLEST), LARGEST)
    # law 3, docs/architecture.md: a group of zeros has s = 1 and q = 0, never 0 / 0
    scale = tl.where(largest == 0, 1.0, scale)
    return tl.where(largest >= 0x7F800000, float("nan"), scale)


@triton.jit
def _forward_kernel(
    weight_ptr,  # [groups, WIDTH]
    mask_ptr,  # [groups, WIDTH] uint8
    result_ptr,  # [groups, WIDTH] weight's dtype (IS_CODES: int8)
    scale_ptr,  # [groups] fp32, written when IS_CODES
    num_groups,
    WIDTH: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    DIVISOR: tl.constexpr,
    DROPPED_BITS: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    HAS_MASK: tl.constexpr,
    IS_CODES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # int64: offsets of a matrix may exceed 2^31
    rows = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    scale = _scales(
        weight_ptr, mask_ptr, rows, num_groups, WIDTH, DIVISOR, DROPPED_BITS, SMALLEST, LARGEST, HAS_MASK, BLOCK_GROUPS, BLOCK_WIDTH
    )  # fmt: skip
    # only NaN differs from itself
    broken = scale != scale
    if IS_CODES:
        tl.store(scale_ptr + rows, scale, mask=rows < num_groups)
    # second sweep, which needs the scale of the whole group
    for start in range(0, WIDTH, BLOCK_WIDTH):
        columns = start + tl.arange(0, BLOCK_WIDTH)
        valid = (rows[:, None] < num_groups) & (columns[None, :] < WIDTH)
        offsets = rows[:, None] * WIDTH + columns[None, :]
        x, _ = masked_weights(weight_ptr, mask_ptr, offsets, valid, HAS_MASK)
        divided = tl.where(broken[:, None], 0.0, tl.math.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)))
        codes = nearest_integers(divided, QMIN, QMAX)
        if IS_CODES:
            tl.store(result_ptr + offsets, codes.to(tl.int8), mask=valid)
        else:
            result = codes * scale[:, None]
            if result_ptr.dtype.element_ty == tl.int16:
                # bf16: rounded here by integer arithmetic, so that ``to_memory`` only moves bits
                result = drop_bits(result, 16)
            result = tl.where(broken[:, None], float("nan"), result)
            tl.store(result_ptr + offsets, to_memory(result, result_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _gradient_kernel(
    grad_ptr,  # [groups, WIDTH] weight's dtype
    weight_ptr,  # [groups, WIDTH]
    mask_ptr,  # [groups, WIDTH] uint8
    result_ptr,  # [groups, WIDTH] weight's dtype
    num_groups,
    WIDTH: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    DIVISOR: tl.constexpr,
    DROPPED_BITS: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    scale = _scales(
        weight_ptr, mask_ptr, rows, num_groups, WIDTH, DIVISOR, DROPPED_BITS, SMALLEST, LARGEST, HAS_MASK, BLOCK_GROUPS, BLOCK_WIDTH
    )  # fmt: skip
    for start in range(0, WIDTH, BLOCK_WIDTH):
        columns = start + tl.arange(0, BLOCK_WIDTH)
        valid = (rows[:, None] < num_groups) & (columns[None, :] < WIDTH)
        offsets = rows[:, None] * WIDTH + columns[None, :]
        # scale and clip mask are computed again by the code of the forward pass, which keeps neither
        x, keep = masked_weights(weight_ptr, mask_ptr, offsets, valid, HAS_MASK)
        divided = tl.math.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        # false for NaN
        inside = (divided >= QMIN) & (divided <= QMAX)
        grad = from_memory(tl.load(grad_ptr + offsets, mask=valid, other=0))
        result = grad * tl.where(inside, keep, 0.0)
        tl.store(result_ptr + offsets, to_memory(result, result_ptr.dtype.element_ty), mask=valid)


def quantize(weight: Tensor, mask: Tensor | None, bits: int, width: int, divisor: float, grid: list[float]) -> tuple[Tensor, Tensor]:
    """(codes int8 [out, in], scales fp32 [out, in / width]) of weights [out, in]; NaN scales mark non-finite groups."""
    weight, mask_bytes = operands(weight, mask)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty((weight.shape[0], weight.shape[1] // width), dtype=torch.float32, device=weight.device)
    tensors = [weight, mask_bytes, codes, scales]
    constants = integer_grid(bits, grid) | {"DIVISOR": divisor, "HAS_MASK": mask is not None, "IS_CODES": True}
    launch_kernel(_forward_kernel, tensors, weight, width, **constants)
    return codes, scales


@torch.library.custom_op("decoct::fake_quant_triton", mutates_args=())
def fake_quant(weight: Tensor, mask: Tensor | None, bits: int, width: int, divisor: float, grid: list[float]) -> Tensor:
    """y [out, in] in the weight's dtype."""
    weight, mask_bytes = operands(weight, mask)
    result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    constants = integer_grid(bits, grid) | {"DIVISOR": divisor, "HAS_MASK": mask is not None, "IS_CODES": False}
    # ``result`` stands in for the pointer of the scales, which are written only with IS_CODES
    launch_kernel(_forward_kernel, [weight, mask_bytes, result, result], weight, width, **constants)
    return result


@torch.library.custom_op("decoct::fake_quant_triton_gradient", mutates_args=())
def fake_quant_gradient(
    grad: Tensor, weight: Tensor, mask: Tensor | None, bits: int, width: int, divisor: float, grid: list[float]
) -> Tensor:  # fmt: skip
    """dL/dw [out, in] from dL/dy, in the weight's dtype."""
    weight, mask_bytes = operands(weight, mask)
    result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    tensors = [grad.contiguous(), weight, mask_bytes, result]
    constants = integer_grid(bits, grid) | {"DIVISOR": divisor, "HAS_MASK": mask is not None}
    launch_kernel(_gradient_kernel, tensors, weight, width, **constants)
    return result


@fake_quant.register_fake
def _(weight: Tensor, mask: Tensor | None, bits: int, width: int, divisor: float, grid: list[float]) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


@fake_quant_gradient.register_fake
def _(grad: Tensor, weight: Tensor, mask: Tensor | None, bits: int, width: int, divisor: float, grid: list[float]) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _save(ctx, inputs, output) -> None:
    weight, mask, *ctx.grid = inputs
    ctx.save_for_backward(weight, mask)


def _backward(ctx, grad: Tensor):
    weight, mask = ctx.saved_tensors
    return fake_quant_gradient(grad, weight, mask, *ctx.grid), None, None, None, None, None


fake_quant.register_autograd(_backward, setup_context=_save)
