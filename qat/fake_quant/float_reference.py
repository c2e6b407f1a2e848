"""Fake quantization to small floats or quantiles in plain PyTorch: for CPUs, and the specification of ``float_kernel.py``.

In fp32 for every dtype of the weight, for each group that shares a scale:

    v = w * mask / s                              true division
    c = nearest(clamp(v, -limit, limit))          nearest value of the code book, as below
    y = c * s                                     zeros are +0
    dL/dw = dL/dy * 1[|v| <= limit] * mask        straight through, s taken as a constant

    kind        limit   nearest: on a tie          s
    nf4         1       the lower quantile         absmax, on the spec's grid
    fp8_e4m3    448     the even code              absmax / 448, on the spec's grid
    mxfp4       6       the even code              2^(floor(log2 absmax) - 2), exponents -127 to 127
    nvfp4       6       the even code              e4m3(absmax / 6 * G) / G, G = 448 * 6 / absmax of the tensor

Zero groups have s = 1 (nvfp4: e4m3 scale 1). A group with a NaN or infinite weight becomes NaN as a whole (nvfp4: the whole tensor).
MXFP4's scale is rounded down, as its standard requires: weights between 6 s and 8 s are clipped to 6 s.

Sources: nf4: Dettmers et al., arXiv 2305.14314, appendix E (table in full precision as in bitsandbytes); fp8: Micikevicius et al.,
arXiv 2209.05433; mxfp4: OCP Microscaling Formats v1.0, sections 5.3 and 6.3; nvfp4: scales as compressed-tensors stores them.
"""

from itertools import pairwise

import torch
from torch import Tensor

from .absmax_reference import group_scales

LIMITS = {"nf4": 1.0, "fp8_e4m3": 448.0, "mxfp4": 6.0, "nvfp4": 6.0}
"""Largest magnitude of a code's value."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the 4-bit float, by code; bit 3 is the sign."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Values of NormalFloat4, by code."""
NF4_MIDPOINTS = tuple((low + high) / 2 for low, high in pairwise(NF4))
# The smallest positive (subnormal) e4m3 number: a smaller scale would be stored as 0.
_SMALLEST_E4M3 = 2.0**-9


def nearest_value(value: Tensor, kind: str) -> Tensor:
    """The fp32 values of the code book of ``kind`` that are nearest to fp32 numbers within its limit. Callers handle -0 and NaN."""
    if kind == "nf4":
        # bucketize puts a number that equals a midpoint into the interval below it
        return value.new_tensor(NF4)[torch.bucketize(value.contiguous(), value.new_tensor(NF4_MIDPOINTS))]
    if kind == "fp8_e4m3":
        # the cast rounds half to even; beyond 448 it would give NaN, so callers clamp
        return value.to(torch.float8_e4m3fn).to(torch.float32)
    magnitude = value.abs()
    # 0, .5, 1, 1.5, 2 | 2, 3, 4 | 4, 6 are evenly spaced parts, in which even codes are even multiples: round half to even is right in each
    step = 0.5 * (1 + (magnitude >= 2).float() + 2 * (magnitude >= 4).float())
    return (value / step).round_().mul_(step)


def power_of_two_scales(absmax: Tensor) -> Tensor:
    """2^(floor(log2 absmax) - 2) from the exponent's bits; 2^-127 is subnormal."""
    # a logarithm in floating point may be off by one at powers of two
    # 2 is the exponent of e2m1's largest number, 6 = 1.5 * 2^2 (OCP MX v1.0, section 6.3)
    exponent = ((absmax.view(torch.int32) >> 23) - 2).clamp_(min=0)
    # a biased exponent of 0 with an empty mantissa would be 0: 2^-127 is the subnormal with the top mantissa bit alone
    bits = torch.where(exponent == 0, 0x00400000, exponent << 23)
    return bits.view(torch.float32)


@torch.library.custom_op("decoct::float_scales", mutates_args=())
def scales(
    weight: Tensor, mask: Tensor | None, kind: str, width: int, shared: bool, grid: list[float], whole: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(divisor s fp32, stored scales fp32, both [out, groups], or [1, 1] if shared; G fp32 [1], which is 1 except for nvfp4).

    ``whole`` is a given G (nvfp4). All devices give the same bits. Groups with NaN or infinite weights have NaN scales.
    """
    kept = weight.to(torch.float32)
    if mask is not None:
        kept = kept * mask.view(torch.uint8).to(torch.float32)
    # [out * groups]
    absmax = kept.reshape(-1, width).abs().amax(1)
    # with a zero, because amax of an empty tensor is an error
    nothing = absmax.new_zeros(1)
    tensor_absmax = torch.cat([absmax, nothing]).amax(0, keepdim=True)
    if shared:
        absmax = tensor_absmax
    shape = _shape(weight, width, shared)
    one = nothing + 1.0
    if kind in ("nf4", "fp8_e4m3"):
        stored = group_scales(absmax, LIMITS[kind], int(grid[0]), grid[1], grid[2]).view(shape)
        return stored, stored.clone(), one
    # NaN for NaN and infinity, else 0: added below, because the casts and clamps would hide them
    bad = absmax * 0.0
    if kind == "mxfp4":
        stored = (power_of_two_scales(absmax).masked_fill_(absmax == 0, 1.0) + bad).view(shape)
        return stored, stored.clone(), one
    whole = global_scale(tensor_absmax) if whole is None else whole.clone()
    stored = block_scales(absmax, whole) + bad
    return (stored / whole).view(shape), stored.view(shape), whole


def global_scale(largest: Tensor) -> Tensor:
    """nvfp4: G fp32 of absmax fp32, any shape; 1 for 0, NaN for NaN and infinity."""
    one = torch.ones_like(largest)
    # G puts the scale of the largest group at 448, the top of e4m3; clamped, because a tiny absmax would make it infinite
    whole = (one * (448.0 * 6.0) / largest).clamp_(max=torch.finfo(torch.float32).max)
    return whole.masked_fill_(largest == 0, 1.0) + largest * 0.0


def block_scales(absmax: Tensor, whole: Tensor, limit: float = 6.0) -> Tensor:
    """nvfp4: fp32 values of e4m3 nearest to absmax / limit * G, positive; 1 for groups of zeros. Callers handle NaN."""
    # the limit as a tensor: for a Python number CUDA multiplies by the reciprocal, which gives other bits
    wanted = (absmax / torch.full_like(absmax, limit) * whole).clamp_(_SMALLEST_E4M3, 448.0)
    return wanted.to(torch.float8_e4m3fn).to(torch.float32).masked_fill_(absmax == 0, 1.0)


def _shape(weight: Tensor, width: int, shared: bool) -> tuple[int, int]:
    return (1, 1) if shared else (weight.shape[0], weight.shape[1] // width)


@scales.register_fake
def _(
    weight: Tensor, mask: Tensor | None, kind: str, width: int, shared: bool, grid: list[float], whole: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    made = [weight.new_empty(_shape(weight, width, shared), dtype=torch.float32) for _ in range(2)]
    return made[0], made[1], weight.new_empty(1, dtype=torch.float32)


def rounded(weight: Tensor, scale: Tensor, mask: Tensor | None, kind: str, width: int) -> tuple[Tensor, Tensor]:
    """(c, v), both fp32 [groups, width]."""
    kept = weight.to(torch.float32)
    if mask is not None:
        kept = kept * mask.view(torch.uint8).to(torch.float32)
    # 0 * scale makes an infinite scale NaN: divided by infinity the group would silently become zeros
    value = kept.reshape(-1, width) / (scale + scale * 0.0).reshape(-1, 1)
    return nearest_value(value.clamp(-LIMITS[kind], LIMITS[kind]), kind), value


@torch.library.custom_op("decoct::fake_quant_float_reference", mutates_args=())
def fake_quant(weight: Tensor, scale: Tensor, mask: Tensor | None, kind: str, width: int) -> tuple[Tensor, Tensor]:
    """(y [out, in] in the weight's dtype, passes uint8 [out, in]: 1 where the gradient passes)."""
    codes, value = rounded(weight, scale, mask, kind, width)
    # -0.0 * v added: it turns -0 into +0, and makes infinities NaN
    result = codes.mul_(scale.reshape(-1, 1)).add_(value, alpha=-0.0)
    passes = (value.abs_() <= LIMITS[kind]).view(torch.uint8).view(weight.shape)
    if mask is not None:
        passes &= mask.view(torch.uint8)
    return result.to(weight.dtype).view(weight.shape).contiguous(), passes.contiguous()


@fake_quant.register_fake
def _(weight: Tensor, scale: Tensor, mask: Tensor | None, kind: str, width: int) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape, dtype=torch.uint8)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])


def _backward(ctx, grad: Tensor, _passes_grad: Tensor | None):
    (passes,) = ctx.saved_tensors
    return grad * passes.to(grad.dtype), None, None, None, None


fake_quant.register_autograd(_backward, setup_context=_save)
