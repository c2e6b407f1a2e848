"""The fake-quant op in plain PyTorch: the implementation for CPUs, and the specification that the Triton kernel equals bit for bit.

For each group of weights that shares a scale (all arithmetic in fp32; fp64 weights stay fp64):

    w = w * mask
    s = clamp(round_to_grid(max|w| / divisor), smallest, largest)     s = 1 where max|w| = 0
    v = w / s                                                         true division
    q = clamp(round_half_even(v), qmin, qmax)
    y = q * s                                                         the output; zeros are +0, as integer codes give
    dL/dw = dL/dy * 1[qmin <= v <= qmax] * mask                       straight through, s taken as a constant

The limits apply to the unrounded v and are inclusive. With the default divisor (2^b - 1) / 2 the largest positive weight of a group has v
near qmax + 1/2: it is clipped to qmax and, like every clipped weight, gets no gradient until the group's maximum or its own value moves. A
group with a NaN or infinite weight becomes NaN as a whole, so that it cannot go unnoticed.

Sources: Bengio et al., arXiv 1308.3432 (straight-through estimator); the clip mask as in LSQ, arXiv 1902.08153, eq. 3.
"""

from typing import Any

import torch
from torch import Tensor

# Scales are rounded to their grid by a cast: fp32 mantissa bits dropped -> the dtype that drops them.
GRID_DTYPES = {16: torch.bfloat16, 13: torch.float16, 0: torch.float32}


def code_limits(bits: int) -> tuple[int, int]:
    """(smallest, largest) signed code of ``bits``: -2^(b-1) and 2^(b-1) - 1. The width 1 stands for the ternary codes -1, 0 and 1."""
    return (-1, 1) if bits == 1 else (-(1 << bits - 1), (1 << bits - 1) - 1)


def group_scales(absmax: Tensor, divisor: float, dropped_bits: int, smallest: float, largest: float) -> Tensor:
    """Scales on their grid for groups with the given largest magnitudes, any shape, fp32 or fp64; same shape and dtype.

    A magnitude of 0 gives 1; NaN and infinity give NaN.
    """
    # a tensor, because for a Python scalar CUDA multiplies by the reciprocal, which gives other bits
    scale = absmax / torch.full((), divisor, dtype=absmax.dtype, device=absmax.device)
    scale = scale.to(GRID_DTYPES[dropped_bits]).to(absmax.dtype).clamp_(smallest, largest)
    scale.masked_fill_(absmax == 0, 1.0)
    # 0 * absmax is NaN for infinity, which the clamp above has hidden
    return scale.add_(absmax, alpha=0.0)


def _flags(flags: Tensor, dtype: torch.dtype) -> Tensor:
    """0/1 numbers of a bool or uint8 tensor, read as uint8: a bool converts to float several times slower."""
    return flags.view(torch.uint8).to(dtype)


def _divided(weight: Tensor, mask: Tensor | None, width: int, divisor: float, grid: list[float]) -> tuple[Tensor, Tensor]:
    """(v [groups, width], scales [groups, 1]) in compute dtype; v is a new tensor that may be overwritten."""
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    kept = weight.to(compute)
    if mask is not None:
        kept = kept * _flags(mask, compute)
    # [out, in] -> [out * groups, width]
    grouped = kept.reshape(-1, width)
    # max and -min instead of abs: no temporary of the weight's size
    absmax = torch.maximum(grouped.amax(1, keepdim=True), grouped.amin(1, keepdim=True).neg_())
    scale = group_scales(absmax, divisor, int(grid[0]), grid[1], grid[2])
    return grouped / scale, scale


def quantize(weight: Tensor, mask: Tensor | None, bits: int, width: int, divisor: float, grid: list[float]) -> tuple[Tensor, Tensor]:
    """(codes int8 [out, in], scales fp32 [out, in / width]) of weights [out, in]; groups that are not finite have NaN scales."""
    value, scale = _divided(weight, mask, width, divisor, grid)
    # NaN becomes code 0: int8 of NaN is undefined, and the NaN scale already marks the group
    codes = value.clamp_(*code_limits(bits)).round_().nan_to_num_(0.0).to(torch.int8)
    return codes.view(weight.shape), scale.view(weight.shape[0], -1).to(torch.float32)


def _forward(weight: Tensor, mask: Tensor | None, bits: int, width: int, divisor: float, grid: list[float]) -> tuple[Tensor, Tensor]:
    """(y [out, in] in the weight's dtype, passes uint8 [out, in]: 1 where the gradient passes)."""
    value, scale = _divided(weight, mask, width, divisor, grid)
    clipped = value.clamp(*code_limits(bits))
    # compared in place as floats and cast by way of int8: on a CPU a bool result, or a cast to uint8, is several times slower
    passes = value.eq_(clipped).to(torch.int8).view(torch.uint8).view(weight.shape)
    if mask is not None:
        passes &= mask.view(torch.uint8)
    # + 0 turns -0 into the +0 that codes give
    result = clipped.round_().mul_(scale).add_(0.0)
    return result.to(weight.dtype).view(weight.shape).contiguous(), passes.contiguous()


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor | None, *numbers: Any) -> Tensor:
        result, passes = _forward(weight, mask, *numbers)
        ctx.save_for_backward(passes)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (passes,) = ctx.saved_tensors
        # in place: the flags are a new tensor
        return _flags(passes, grads[0].dtype).mul_(grads[0]), None, None, None, None, None


def fake_quant(weight: Tensor, mask: Tensor | None, bits: int, width: int, divisor: float, grid: list[float]) -> Tensor:
    """y [out, in] in the weight's dtype, differentiable in ``weight``; inside torch.compile the op below."""
    if torch.compiler.is_compiling():
        return fake_quant_op(weight, mask, bits, width, divisor, grid)[0]
    # a custom op's dispatch and checks take longer than the arithmetic of a small layer
    return _Eager.apply(weight, mask, bits, width, divisor, grid)  # pyright: ignore[reportReturnType]


# A custom op is opaque to compilers: one that fused the division or the rounding could change bits.
@torch.library.custom_op("decoct::fake_quant_reference", mutates_args=())
def fake_quant_op(
    weight: Tensor, mask: Tensor | None, bits: int, width: int, divisor: float, grid: list[float]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``_forward`` as an op."""
    return _forward(weight, mask, bits, width, divisor, grid)


@fake_quant_op.register_fake
def _(weight: Tensor, mask: Tensor | None, bits: int, width: int, divisor: float, grid: list[float]) -> tuple[Tensor, Tensor]:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device), torch.empty(
        weight.shape, dtype=torch.uint8, device=weight.device
    )


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])


def _backward(ctx, grad: Tensor, _passes_grad: Tensor | None):
    (passes,) = ctx.saved_tensors
    return grad * _flags(passes, grad.dtype), None, None, None, None, None


fake_quant_op.register_autograd(_backward, setup_context=_save)
