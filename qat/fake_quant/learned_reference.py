"""Fake quantization with given scales, which may be learned, in plain PyTorch: for CPUs, and the specification of ``learned_kernel.py``.

For each group of N weights that shares a scale (fp32 arithmetic; fp64 weights stay fp64), z = 0 without a zero point:

    s = clamp(round_to_grid(scale), smallest, largest)
    v = w * mask / s                                               true division
    c = clamp(round_half_even(v), qmin - z, qmax - z)              the stored code is c + z
    y = c * s
    dL/dw = dL/dy * 1[qmin - z <= v <= qmax - z] * mask
    dL/dscale = 1 / sqrt(N qmax) * sum over the group of dL/dy * (c - v inside the limits, c outside)

Rounding the scale to its grid and its limits is straight through, but a scale outside a limit keeps only the gradient that moves it back,
so that it neither stays there nor moves away. The sum is computed as c - v = (c s - w) / s: c s - w is exact in fp32 for a scale on a bf16
or fp16 grid (for others it is computed in fp64), while the rounding of v by the division would be visible in the sum at 8 bits. A NaN or
infinite weight gives NaN in its place, a NaN or infinite scale in its whole group, so that neither goes unnoticed.

Source: Esser et al., LSQ, arXiv 1902.08153, eq. 1 to 3 and section 2.2 (the factor); zero points as constants.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .absmax_reference import GRID_DTYPES, code_limits

Limits = tuple[float, float] | tuple[Tensor, Tensor]


def on_grid(scale: Tensor, grid: list[float]) -> Tensor:
    """Scales of any shape rounded to their grid, fp32; NaN for NaN and infinity."""
    scale = scale.detach().to(torch.float32)
    # 0 * scale is added: NaN for NaN and infinity, which the clamp would hide
    return scale.to(GRID_DTYPES[int(grid[0])]).to(torch.float32).clamp_(grid[1], grid[2]).add_(scale, alpha=0.0)


def _limits(zeros: Tensor | None, bits: int, dtype: torch.dtype) -> Limits:
    """(qmin - z, qmax - z): floats, or [groups, 1] with zero points."""
    qmin, qmax = code_limits(bits)
    if zeros is None:
        return float(qmin), float(qmax)
    # [out, groups] -> [out * groups, 1], the rows of ``_divided``
    shift = zeros.reshape(-1, 1).to(dtype)
    return qmin - shift, qmax - shift


def _clamped(value: Tensor, limits: Limits) -> Tensor:
    low, high = limits
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return torch.clamp(value, low, high)
    return torch.clamp(value, float(low), float(high))


def _rounded(scale: Tensor, weight: Tensor, grid: list[float]) -> Tensor:
    """Scales on their grid [groups or 1, 1] in compute dtype."""
    return on_grid(scale, grid).to(torch.float64 if weight.dtype == torch.float64 else torch.float32).reshape(-1, 1)


def _divided(weight: Tensor, scale: Tensor, mask: Tensor | None, width: int, grid: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """(v, w * mask, both [groups, width], scales on their grid [groups or 1, 1]) in compute dtype; v may be overwritten."""
    rounded = _rounded(scale, weight, grid)
    kept = weight.to(rounded.dtype)
    if mask is not None:
        kept = kept * mask.view(torch.uint8).to(rounded.dtype)
    kept = kept.reshape(-1, width)
    return kept / rounded, kept, rounded


def quantize(
    weight: Tensor, scale: Tensor, mask: Tensor | None, zeros: Tensor | None, bits: int, width: int, grid: list[float]
) -> Tensor:  # fmt: skip
    """Codes int8 [out, in], zero points included; codes of NaN weights are arbitrary."""
    value, _, _ = _divided(weight, scale, mask, width, grid)
    codes = _clamped(value, _limits(zeros, bits, value.dtype)).round_().nan_to_num_(0.0)
    if zeros is not None:
        # q - z is within [qmin - z, qmax - z], so q fits int8
        codes += zeros.reshape(-1, 1)
    return codes.to(torch.int8).view(weight.shape)


def _forward(
    weight: Tensor, scale: Tensor, mask: Tensor | None, zeros: Tensor | None, bits: int, width: int, grid: list[float]
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y [out, in] in the weight's dtype, passes uint8 [out, in]: 1 where the weight's gradient passes, scales on their grid)."""
    value, kept, rounded = _divided(weight, scale, mask, width, grid)
    clipped = _clamped(value, _limits(zeros, bits, value.dtype))
    # see ``absmax_reference._forward``
    passes = value.eq_(clipped).to(torch.int8).view(torch.uint8).view(weight.shape)
    if mask is not None:
        passes &= mask.view(torch.uint8)
    # -0.0 * w added: it turns the -0 of small negative weights into the +0 that codes give, and makes infinities NaN
    result = clipped.round_().mul_(rounded).add_(kept, alpha=-0.0)
    return result.to(weight.dtype).view(weight.shape).contiguous(), passes.contiguous(), rounded


def back_inside(gradient: Tensor, scale: Tensor, grid: list[float]) -> Tensor:
    """The gradient of scales, 0 where it would move a scale that is outside a limit farther away."""
    # a positive gradient makes a scale smaller
    outwards = ((scale < grid[1]) & (gradient > 0)) | ((scale > grid[2]) & (gradient < 0))
    return gradient.masked_fill(outwards, 0.0)


def _scale_gradient(
    grad: Tensor,
    result: Tensor | None,
    passes: Tensor,
    weight: Tensor,
    scale: Tensor,
    rounded: Tensor,
    mask: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    width: int,
    grid: list[float],
    factor: float,
) -> Tensor:
    """dL/dscale fp32. ``passes`` may have any dtype; ``result`` is None if its values are not exact: c s is then computed in fp64."""
    if result is not None:
        # inside the limits c s - w, outside c s
        off = torch.addcmul(result, passes.to(torch.float32), weight, value=-1.0).reshape(-1, width)
    else:
        value, _, _ = _divided(weight, scale, mask, width, grid)
        # c s - w inside the limits, c s outside, in fp64: an fp32 product of a 24-bit scale would be rounded
        off = _clamped(value, _limits(zeros, bits, value.dtype)).round_().to(torch.float64).mul_(rounded.to(torch.float64))
        off.sub_((weight.to(torch.float64) * passes).reshape(-1, width))
    # [out * groups]
    sums = off.mul_(grad.reshape(-1, width)).sum(1)
    if scale.numel() == 1:
        sums = sums.sum(dtype=torch.float64)
    sums = sums.reshape(scale.shape).div_(rounded.view(scale.shape)).mul_(factor)
    sums = sums.to(torch.float32)
    # on a CPU a look at the scales is faster than the seven small operations of ``back_inside``; on a GPU it would wait for the device
    settled = scale.device.type == "cpu" and scale.numel() > 0 and grid[1] <= float(scale.min()) and float(scale.max()) <= grid[2]
    return sums if settled else back_inside(sums, scale, grid)


def _exact(weight: Tensor, grid: list[float]) -> bool:
    """Whether c s and c s - w are exact in fp32: on a bf16 or fp16 grid codes * scales have at most 8 + 11 bits."""
    return weight.dtype == torch.float32 and grid[0] > 0


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, mask: Tensor | None, zeros: Tensor | None, *numbers: Any) -> Tensor:
        bits, width, grid, _ = ctx.numbers = numbers
        result, passes, rounded = _forward(weight, scale, mask, zeros, bits, width, grid)
        # a fixed scale needs nothing but the clip mask, one byte per weight
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(passes, result if _exact(weight, grid) else None, weight, scale, rounded, mask, zeros)
        else:
            ctx.save_for_backward(passes)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        passes, *saved = ctx.saved_tensors
        flags, scale_grad = passes.to(grad.dtype), None
        if saved:
            scale_grad = _scale_gradient(grad, saved[0], flags, *saved[1:], *ctx.numbers)
        # in place: the flags are a new tensor
        return flags.mul_(grad) if ctx.needs_input_grad[0] else None, scale_grad, *[None] * 6


def fake_quant(
    weight: Tensor, scale: Tensor, mask: Tensor | None, zeros: Tensor | None, bits: int, width: int, grid: list[float], factor: float
) -> Tensor:  # fmt: skip
    """y [out, in] in the weight's dtype, differentiable in ``weight`` and ``scale``; inside torch.compile the op below."""
    if torch.compiler.is_compiling():
        return fake_quant_op(weight, scale, mask, zeros, bits, width, grid, factor)[0]
    # a custom op's dispatch and checks take longer than the arithmetic of a small layer
    return _Eager.apply(weight, scale, mask, zeros, bits, width, grid, factor)  # pyright: ignore[reportReturnType]


# A custom op is opaque to compilers: one that removed the cast to the scale's grid and back, or fused the division, would change numbers.
@torch.library.custom_op("decoct::fake_quant_learned_reference", mutates_args=())
def fake_quant_op(
    weight: Tensor, scale: Tensor, mask: Tensor | None, zeros: Tensor | None, bits: int, width: int, grid: list[float], factor: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, passes) of ``_forward``."""
    return _forward(weight, scale, mask, zeros, bits, width, grid)[:2]


@fake_quant_op.register_fake
def _(
    weight: Tensor, scale: Tensor, mask: Tensor | None, zeros: Tensor | None, bits: int, width: int, grid: list[float], factor: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device), torch.empty(
        weight.shape, dtype=torch.uint8, device=weight.device
    )


@torch.library.custom_op("decoct::fake_quant_learned_reference_scale_gradient", mutates_args=())
def scale_gradient_op(
    grad: Tensor,
    result: Tensor | None,
    passes: Tensor,
    weight: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    width: int,
    grid: list[float],
    factor: float,
) -> Tensor:
    """``_scale_gradient`` as an op."""
    rounded = _rounded(scale, weight, grid)
    return _scale_gradient(grad, result, passes, weight, scale, rounded, mask, zeros, bits, width, grid, factor)


@scale_gradient_op.register_fake
def _(
    grad: Tensor,
    result: Tensor | None,
    passes: Tensor,
    weight: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    width: int,
    grid: list[float],
    factor: float,
) -> Tensor:
    return torch.empty(scale.shape, dtype=torch.float32, device=scale.device)


def _save(ctx, inputs, output) -> None:
    weight, scale, mask, zeros, *ctx.numbers = inputs
    result, passes = output
    if not ctx.needs_input_grad[1]:
        ctx.save_for_backward(passes)
        return
    ctx.save_for_backward(passes, result if _exact(weight, ctx.numbers[2]) else None, weight, scale, mask, zeros)


def _backward(ctx, grad: Tensor, _passes_grad: Tensor | None):
    passes, *saved = ctx.saved_tensors
    weight_grad = grad * passes.to(grad.dtype) if ctx.needs_input_grad[0] else None
    scale_grad = None
    if ctx.needs_input_grad[1]:
        result, *rest = saved
        scale_grad = scale_gradient_op(grad, result, passes, *rest, *ctx.numbers)
    return (weight_grad, scale_grad, *[None] * 6)


fake_quant_op.register_autograd(_backward, setup_context=_save)
