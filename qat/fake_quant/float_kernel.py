"""Small floats and quantiles as Triton kernels with given scales; ``float_reference.py`` is the spec.

``common_kernel.py`` explains why both give the same bits.

e4m3 and e2m1 are rounded by the magic-number add at the spacing of the number's binade, so that no float8 hardware is needed.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common_kernel import drop_bits, finite, from_memory, launch_kernel, masked_weights, operands, to_memory
from .float_reference import LIMITS, NF4, NF4_MIDPOINTS

# constexpr numbers of the ways to round
_WAYS = {"nf4": 0, "fp8_e4m3": 1, "mxfp4": 2, "nvfp4": 2}


@triton.jit
def _nearest(value, table_ptr, WAY: tl.constexpr):
    """fp32 numbers of the code book; table_ptr fp32 [31] = 16 quantiles, 15 midpoints. Never -0."""
    if WAY == 0:
        # starts at the lowest quantile and takes the next one for each midpoint below the value; > keeps the lower of two on a tie
        result = tl.full(value.shape, 0.0, tl.float32) + tl.load(table_ptr)
        for i in tl.static_range(15):
            result = tl.where(value > tl.load(table_ptr + 16 + i), tl.load(table_ptr + 1 + i), result)
    else:
        magnitude = tl.abs(value)
        if WAY == 1:
            # 1.5 * 2^(20 + e), where e >= -6 is the exponent: numbers there are 2^(e - 3) apart
            # biased exponents: 121 is that of 2^-6, below which e4m3 is subnormal and evenly spaced
            exponent = tl.maximum(magnitude.to(tl.int32, bitcast=True) >> 23, 121)
            magic = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
        else:
            # 1.5 times 2^24, 2^23 and 2^22, where fp32 numbers are 2, 1 and 1/2 apart, as e2m1's are from 4, from 2 and below 2
            magic = tl.where(magnitude >= 4.0, 25165824.0, tl.where(magnitude >= 2.0, 12582912.0, 6291456.0))
        result = (value + magic) - magic
    return result


@triton.jit
def _kernel(
    grad_ptr,  # [groups, WIDTH] weight's dtype, read when IS_GRADIENT
    weight_ptr,  # [groups, WIDTH] fp32, fp16, or bf16 as int16
    mask_ptr,  # [groups, WIDTH] uint8
    scale_ptr,  # [groups] fp32, or one number
    table_ptr,  # fp32 [31]
    result_ptr,  # [groups, WIDTH] weight's dtype: values, or the weight's gradient
    num_groups,
    WIDTH: tl.constexpr,
    WAY: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SHARED: tl.constexpr,
    IS_GRADIENT: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    scale = tl.load(scale_ptr + rows * (0 if SHARED else 1), mask=rows < num_groups, other=1.0)
    fine = finite(scale)
    # a broken scale divides by 1 here; ``whole`` turns its group into NaN below
    scale = tl.where(fine, scale, 1.0)
    for start in range(0, WIDTH, BLOCK_WIDTH):
        columns = start + tl.arange(0, BLOCK_WIDTH)
        valid = (rows[:, None] < num_groups) & (columns[None, :] < WIDTH)
        offsets = rows[:, None] * WIDTH + columns[None, :]
        x, keep = masked_weights(weight_ptr, mask_ptr, offsets, valid, HAS_MASK)
        value = tl.math.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        # of the quotient: a large weight by a small given scale may overflow
        whole = finite(value) & fine[:, None]
        value = tl.where(whole, value, 0.0)
        if IS_GRADIENT:
            grad = from_memory(tl.load(grad_ptr + offsets, mask=valid, other=0))
            result = grad * tl.where(whole & (tl.abs(value) <= LIMIT), keep, 0.0)
        else:
            # clamped first: the magic numbers fit only values within the limit
            codes = _nearest(tl.minimum(tl.maximum(value, -LIMIT), LIMIT), table_ptr, WAY)
            result = codes * scale[:, None]
            if result_ptr.dtype.element_ty == tl.int16:
                # rounded here by integer arithmetic; ``to_memory`` only moves the upper half
                result = drop_bits(result, 16)
            result = tl.where(whole, result, float("nan"))
        tl.store(result_ptr + offsets, to_memory(result, result_ptr.dtype.element_ty), mask=valid)


@functools.cache
def _table(device: torch.device) -> Tensor:
    """fp32 [31] on the device: NF4's quantiles and midpoints."""
    return torch.tensor((*NF4, *NF4_MIDPOINTS), dtype=torch.float32, device=device)


def _run(grad: Tensor | None, weight: Tensor, scale: Tensor, mask: Tensor | None, kind: str, width: int) -> Tensor:
    """Values, or with ``grad`` the weight's gradient, [out, in] in the weight's dtype."""
    weight, mask_bytes = operands(weight, mask)
    result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    tensors = [weight if grad is None else grad.contiguous(), weight, mask_bytes, scale.contiguous(), _table(weight.device), result]
    constants = {"WAY": _WAYS[kind], "LIMIT": LIMITS[kind], "HAS_MASK": mask is not None, "SHARED": scale.numel() == 1}
    launch_kernel(_kernel, tensors, weight, width, **constants, IS_GRADIENT=grad is not None)
    return result


@torch.library.custom_op("decoct::fake_quant_float_triton", mutates_args=())
def fake_quant(weight: Tensor, scale: Tensor, mask: Tensor | None, kind: str, width: int) -> Tensor:
    """y [out, in] in the weight's dtype."""
    return _run(None, weight, scale, mask, kind, width)


@torch.library.custom_op("decoct::fake_quant_float_triton_gradient", mutates_args=())
def fake_quant_gradient(grad: Tensor, weight: Tensor, scale: Tensor, mask: Tensor | None, kind: str, width: int) -> Tensor:
    """dL/dw [out, in] from dL/dy, in the weight's dtype."""
    return _run(grad, weight, scale, mask, kind, width)


@fake_quant.register_fake
def _(weight: Tensor, scale: Tensor, mask: Tensor | None, kind: str, width: int) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


@fake_quant_gradient.register_fake
def _(grad: Tensor, weight: Tensor, scale: Tensor, mask: Tensor | None, kind: str, width: int) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.kind, ctx.width = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    return (fake_quant_gradient(grad, *ctx.saved_tensors, ctx.kind, ctx.width), None, None, None, None)


fake_quant.register_autograd(_backward, setup_context=_save)
