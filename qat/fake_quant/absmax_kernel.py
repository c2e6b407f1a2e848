"""The fake-quant op as Triton kernels: the weight is read once and written once, and nothing is kept for the backward.

Bit for bit what ``absmax_reference.py`` computes, on a GPU and in Triton's interpreter (``TRITON_INTERPRET=1``), because
- division is ``div_rn`` (``/`` may be approximate in fp32);
- rounding half to even is the magic-number add after the clamp (``libdevice.rint`` does not run in the interpreter);
- bf16 travels as int16 and is cast by integer arithmetic, as is the scale to its grid (the interpreter's own bf16 casts
  truncate and lose subnormal numbers);
- the largest magnitude is a maximum over integers: fp32 magnitudes order as their bits do, NaN and infinity on top;
- the backward recomputes scale and clip mask from the weight, by the same code.

The matrix [out, in] is seen as [out * in / width groups, width]; a program handles a block of whole groups, in column
blocks when a group is wider than one block. No atomics: results do not depend on scheduling.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements a program holds at a time: 16 per thread of 4 warps, so that a program's tile stays in registers.
_TILE_ELEMENTS = 2048
# A group wider than this is walked in column blocks.
_MAX_BLOCK_WIDTH = 2048


@triton.jit
def _drop_bits(x, DROPPED_BITS: tl.constexpr):
    """fp32 -> fp32 without its last mantissa bits, round half to even; x finite, and no subnormal of the target type."""
    bits = x.to(tl.int32, bitcast=True)
    odd = (bits >> DROPPED_BITS) & 1
    bits = ((bits + ((1 << (DROPPED_BITS - 1)) - 1) + odd) >> DROPPED_BITS) << DROPPED_BITS
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _from_memory(raw):
    """fp32 of loaded fp32, fp16 or, as int16, bf16 numbers; exact."""
    if raw.dtype == tl.int16:
        x = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        x = raw.to(tl.float32)
    return x


@triton.jit
def _to_memory(x, dtype: tl.constexpr):
    """fp32 -> what is stored; for bf16 (int16) the number must be one of bf16 already."""
    if dtype == tl.int16:
        raw = (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16)
    else:
        raw = x.to(dtype)
    return raw


@triton.jit
def _weights(weight_ptr, mask_ptr, offsets, valid, HAS_MASK: tl.constexpr):
    """fp32 [groups, columns] of w * mask, and the mask as 0/1 (all 1 without one)."""
    x = _from_memory(tl.load(weight_ptr + offsets, mask=valid, other=0))
    keep = tl.full(x.shape, 1.0, tl.float32)
    if HAS_MASK:
        keep = tl.load(mask_ptr + offsets, mask=valid, other=0).to(tl.float32)
        x = x * keep
    return x, keep


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
    for start in range(0, WIDTH, BLOCK_WIDTH):
        columns = start + tl.arange(0, BLOCK_WIDTH)
        valid = (rows[:, None] < num_groups) & (columns[None, :] < WIDTH)
        x, _ = _weights(weight_ptr, mask_ptr, rows[:, None] * WIDTH + columns[None, :], valid, HAS_MASK)
        magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, tl.max(magnitude, axis=1))
    # any finite stand-in will do where the result is replaced below
    finite = tl.where(largest >= 0x7F800000, 0, largest)
    scale = tl.math.div_rn(finite.to(tl.float32, bitcast=True), tl.full([BLOCK_GROUPS], DIVISOR, tl.float32))
    if DROPPED_BITS > 0:
        scale = _drop_bits(scale, DROPPED_BITS)
    scale = tl.minimum(tl.maximum(scale, SMALLEST), LARGEST)
    scale = tl.where(largest == 0, 1.0, scale)
    return tl.where(largest >= 0x7F800000, float("nan"), scale)


@triton.jit
def _codes(value, QMIN: tl.constexpr, QMAX: tl.constexpr):
    """fp32 integers: clamp, then round half to even by adding 1.5 * 2^23, where fp32 numbers are 1 apart; never -0."""
    clipped = tl.minimum(tl.maximum(value, QMIN * 1.0), QMAX * 1.0)
    return (clipped + 12582912.0) - 12582912.0


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
    rows = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    scale = _scales(
        weight_ptr, mask_ptr, rows, num_groups, WIDTH, DIVISOR, DROPPED_BITS, SMALLEST, LARGEST, HAS_MASK, BLOCK_GROUPS, BLOCK_WIDTH
    )  # fmt: skip
    broken = scale != scale
    if IS_CODES:
        tl.store(scale_ptr + rows, scale, mask=rows < num_groups)
    for start in range(0, WIDTH, BLOCK_WIDTH):
        columns = start + tl.arange(0, BLOCK_WIDTH)
        valid = (rows[:, None] < num_groups) & (columns[None, :] < WIDTH)
        offsets = rows[:, None] * WIDTH + columns[None, :]
        x, _ = _weights(weight_ptr, mask_ptr, offsets, valid, HAS_MASK)
        divided = tl.where(broken[:, None], 0.0, tl.math.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)))
        codes = _codes(divided, QMIN, QMAX)
        if IS_CODES:
            tl.store(result_ptr + offsets, codes.to(tl.int8), mask=valid)
        else:
            result = codes * scale[:, None]
            if result_ptr.dtype.element_ty == tl.int16:
                result = _drop_bits(result, 16)
            result = tl.where(broken[:, None], float("nan"), result)
            tl.store(result_ptr + offsets, _to_memory(result, result_ptr.dtype.element_ty), mask=valid)


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
        x, keep = _weights(weight_ptr, mask_ptr, offsets, valid, HAS_MASK)
        divided = tl.math.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        # false for NaN
        inside = (divided >= QMIN * 1.0) & (divided <= QMAX * 1.0)
        grad = _from_memory(tl.load(grad_ptr + offsets, mask=valid, other=0))
        result = grad * tl.where(inside, keep, 0.0)
        tl.store(result_ptr + offsets, _to_memory(result, result_ptr.dtype.element_ty), mask=valid)


def _launch(kernel, tensors: list[Tensor], like: Tensor, width: int, bits: int, divisor: float, grid: list[float], **flags: bool) -> None:
    """Runs ``kernel`` over all groups of ``like`` on its device."""
    num_groups = like.numel() // width
    if num_groups == 0:
        return
    block_width = min(triton.next_power_of_2(width), _MAX_BLOCK_WIDTH)
    block_groups = max(1, _TILE_ELEMENTS // block_width)
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        kernel[(triton.cdiv(num_groups, block_groups),)](
            *(t.view(torch.int16) if t.dtype == torch.bfloat16 else t for t in tensors),
            num_groups,
            WIDTH=width,
            QMIN=-(2 ** (bits - 1)),
            QMAX=2 ** (bits - 1) - 1,
            DIVISOR=divisor,
            DROPPED_BITS=int(grid[0]),
            SMALLEST=grid[1],
            LARGEST=grid[2],
            BLOCK_GROUPS=block_groups,
            BLOCK_WIDTH=block_width,
            **flags,
        )


def _operands(weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Contiguous weight and mask bytes; without a mask the weight stands in for the pointer that is never read."""
    weight = weight.contiguous()
    return weight, weight if mask is None else mask.contiguous().view(torch.uint8)


def runs_on(device: torch.device) -> bool:
    """Whether the kernels can run on tensors of ``device``: CUDA, or the CPU when they were loaded for the interpreter."""
    interpreted = not isinstance(_forward_kernel, triton.JITFunction)
    return device.type == "cuda" or (interpreted and device.type == "cpu")


def quantize(weight: Tensor, mask: Tensor | None, bits: int, width: int, divisor: float, grid: list[float]) -> tuple[Tensor, Tensor]:
    """(codes int8 [out, in], scales fp32 [out, in / width]) of weights [out, in]; NaN scales mark non-finite groups."""
    weight, mask_bytes = _operands(weight, mask)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty((weight.shape[0], weight.shape[1] // width), dtype=torch.float32, device=weight.device)
    tensors = [weight, mask_bytes, codes, scales]
    _launch(_forward_kernel, tensors, weight, width, bits, divisor, grid, HAS_MASK=mask is not None, IS_CODES=True)
    return codes, scales


@torch.library.custom_op("decoct::fake_quant_triton", mutates_args=())
def fake_quant(weight: Tensor, mask: Tensor | None, bits: int, width: int, divisor: float, grid: list[float]) -> Tensor:
    """y [out, in] in the weight's dtype."""
    weight, mask_bytes = _operands(weight, mask)
    result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    flags = {"HAS_MASK": mask is not None, "IS_CODES": False}
    _launch(_forward_kernel, [weight, mask_bytes, result, result], weight, width, bits, divisor, grid, **flags)
    return result


@torch.library.custom_op("decoct::fake_quant_triton_gradient", mutates_args=())
def fake_quant_gradient(
    grad: Tensor, weight: Tensor, mask: Tensor | None, bits: int, width: int, divisor: float, grid: list[float]
) -> Tensor:  # fmt: skip
    """dL/dw [out, in] from dL/dy, in the weight's dtype."""
    weight, mask_bytes = _operands(weight, mask)
    result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    tensors = [grad.contiguous(), weight, mask_bytes, result]
    _launch(_gradient_kernel, tensors, weight, width, bits, divisor, grid, HAS_MASK=mask is not None)
    return result


@fake_quant.register_fake
def _(weight: Tensor, mask: Tensor | None, bits: int, width: int, divisor: float, grid: list[float]) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


@fake_quant_gradient.register_fake
def _(grad: Tensor, weight: Tensor, mask: Tensor | None, bits: int, width: int, divisor: float, grid: list[float]) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _save(ctx, inputs, output) -> None:
    weight, mask, *ctx.lattice = inputs
    ctx.save_for_backward(weight, mask)


def _backward(ctx, grad: Tensor):
    weight, mask = ctx.saved_tensors
    return fake_quant_gradient(grad, weight, mask, *ctx.lattice), None, None, None, None, None


fake_quant.register_autograd(_backward, setup_context=_save)
