"""Fake quantization to super-blocks (``../super_blocks.py``) in plain PyTorch: the specification, and the only implementation so far.

Scales from the weights, for each sub-block with smallest weight lo and largest hi, in fp32:

    with minimums:  s = (max(hi, 0) - min(lo, 0)) / (2^b - 1)      n = -min(lo, 0)
    without:        s = -e / 2^(b-1), e = the weight of the largest magnitude, so that it is code -2^(b-1)

    d    = fp16(max|s| of the super-block / most)      sc = round(s / d), at least 1 in magnitude, at most ``most``
    dmin = fp16(max n of the super-block / most)       m = round(n / dmin), 0..most

Codes and values with given scales, S = d * sc and M = dmin * m (0 without minimums):

    r = round_half_even((w + M) / S)
    q = clamp(r, smallest code, largest code)
    y = q * S - M
    dL/dw = dL/dy * 1[r = q] * mask                    straight through, scales taken as constants

A super-block of zeros has d = 1, dmin = 0, sc = 1 and codes 0. fp16 numbers are clamped to [2^-24, 65504]. A super-block with a NaN or
infinite weight becomes NaN as a whole. No sub-scale is 0: it would make every weight of its sub-block the same.

Source: as in ``../super_blocks.py``; the choice of scales is decoct's (llama.cpp searches, see ``ptq/super_search.py``).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..super_blocks import SUPER_BLOCKS, WIDTH

SMALLEST, LARGEST = 2.0**-24, 65504.0
"""Limits of positive fp16 numbers."""


class SubScales(NamedTuple):
    """The integers of a weight's sub-blocks, and the second fp16 number of its super-blocks."""

    scales: Tensor
    """int8 [out, in / sub-block]: sc."""
    minimum: Tensor | None = None
    """fp32 [out, in / 256], fp16 numbers that are not negative: dmin; None for kinds without minimums."""
    minimums: Tensor | None = None
    """int8 [out, in / sub-block]: m; None for kinds without minimums."""

    def to(self, device: torch.device | str) -> "SubScales":
        """The same on another device."""
        return SubScales(*(None if part is None else part.to(device) for part in self))  # pyright: ignore[reportArgumentType]

    def rows(self, rows: slice) -> "SubScales":
        """Those of some outputs."""
        return SubScales(*(None if part is None else part[rows] for part in self))  # pyright: ignore[reportArgumentType]


def half(values: Tensor) -> Tensor:
    """fp32 numbers rounded to positive fp16 numbers."""
    return values.to(torch.float16).to(torch.float32).clamp(SMALLEST, LARGEST)


def whole_scales(scales: Tensor, divisor: Tensor, most: int) -> Tensor:
    """fp32 whole numbers: ``scales`` / ``divisor`` rounded, at least 1 and at most ``most`` in magnitude, with the sign of ``scales``."""
    sign = 1.0 - 2.0 * (scales < 0)
    return (scales / divisor).abs_().round_().clamp_(1.0, float(most)).mul_(sign)


def scales_of_weight(weight: Tensor, kind: str) -> tuple[Tensor, SubScales]:
    """(d fp32 [out, in / 256], sub-scales) for weights fp32 [out, in]; d is NaN where a weight is not finite."""
    form = SUPER_BLOCKS[kind]
    grouped = weight.view(weight.shape[0], weight.shape[1] // WIDTH, WIDTH // form.width, form.width)
    low, high = grouped.amin(3), grouped.amax(3)
    # NaN for NaN and infinity, else 0: added at the end, because clamps hide them
    bad = (low * 0.0 + high * 0.0).sum(2)
    if form.minimum:
        low = low.clamp(max=0.0)
        wanted = (high.clamp(min=0.0) - low) / _number(low, form.codes[1])
    else:
        wanted = torch.where(high >= -low, high, low) / _number(low, form.codes[0])
    largest = wanted.abs().amax(2)
    # tensors as divisors: for a Python number CUDA multiplies by the reciprocal, which gives other bits
    scale = half(largest / _number(low, form.most)).masked_fill_(largest == 0, 1.0)
    sub = whole_scales(wanted, scale.unsqueeze(2), form.most).nan_to_num_(1.0).to(torch.int8).flatten(1)
    scale = scale + bad
    if not form.minimum:
        return scale, SubScales(sub)
    deepest = low.neg_().amax(2)
    minimum = half(deepest / _number(low, form.most)).masked_fill_(deepest == 0, 0.0)
    # 0 / 0 where there is no minimum
    counts = (low / minimum.unsqueeze(2)).nan_to_num_(0.0).round_().clamp_(0.0, float(form.most)).to(torch.int8).flatten(1)
    return scale, SubScales(sub, minimum, counts)


def _number(like: Tensor, value: int) -> Tensor:
    return torch.full((), float(value), dtype=torch.float32, device=like.device)


def steps(scale: Tensor, sub: SubScales) -> tuple[Tensor, Tensor | None]:
    """(S, M), each fp32 [out, in / sub-block], exact; M is None for kinds without minimums."""
    many = sub.scales.shape[1] // scale.shape[1] if scale.shape[1] else 1
    step = scale.repeat_interleave(many, 1) * sub.scales
    if sub.minimum is None or sub.minimums is None:
        return step, None
    return step, sub.minimum.repeat_interleave(many, 1) * sub.minimums


def rounded(weight: Tensor, scale: Tensor, sub: SubScales, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, unclamped codes, values), each fp32 [out, groups, width of a sub-block], of weights fp32 [out, in]."""
    form = SUPER_BLOCKS[kind]
    grouped = weight.view(weight.shape[0], weight.shape[1] // form.width, form.width)
    step, minimum = (part if part is None else part.unsqueeze(2) for part in steps(scale, sub))
    assert step is not None
    free = (grouped / step if minimum is None else (grouped + minimum) / step).round_()
    codes = free.clamp(*form.codes)
    # + 0 turns -0 into +0
    values = (codes * step).add_(0.0) if minimum is None else codes * step - minimum
    return codes, free, values


def decoded(codes: Tensor, scale: Tensor, sub: SubScales) -> Tensor:
    """fp32 [out, in]: the values of codes int8 [out, in]."""
    step, minimum = steps(scale, sub)
    grouped = codes.to(torch.float32).view(*step.shape, codes.shape[1] // max(1, step.shape[1]))
    values = grouped * step.unsqueeze(2)
    values = values + 0.0 if minimum is None else values - minimum.unsqueeze(2)
    return values.reshape(codes.shape)


def kept_weights(weight: Tensor, mask: Tensor | None) -> Tensor:
    """fp32 [out, in], contiguous: the weights, pruned ones as zeros."""
    kept = weight.to(torch.float32)
    return (kept if mask is None else kept * mask.view(torch.uint8).to(torch.float32)).contiguous()


# a custom op is opaque to compilers: one that fused the division or the rounding could change bits
@torch.library.custom_op("decoct::fake_quant_super", mutates_args=())
def fake_quant(weight: Tensor, mask: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """(y [out, in] in the weight's dtype, passes uint8 [out, in]: 1 where the gradient passes)."""
    kept = kept_weights(weight, mask)
    codes, free, values = rounded(kept, *scales_of_weight(kept, kind), kind)
    passes = (codes == free).view(torch.uint8).view(weight.shape)
    if mask is not None:
        passes = passes & mask.view(torch.uint8)
    return values.to(weight.dtype).view(weight.shape), passes.clone()


@fake_quant.register_fake
def _(weight: Tensor, mask: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    made = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return made, torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])


def _backward(ctx, grad: Tensor, _passes_grad: Tensor | None):
    (passes,) = ctx.saved_tensors
    return grad * passes.to(grad.dtype), None, None


fake_quant.register_autograd(_backward, setup_context=_save)
