"""Fake quantization of linear weights: the rounding that export stores, inside the forward, with a gradient.

Imports torch alone (triton only when its kernels run), so it can be lifted into any training loop:

    y = F.linear(x, fake_quant(linear.weight, QuantSpec(bits=4, group_size=32)), linear.bias)

``reference.py`` holds the formulas and is the CPU path; ``kernel.py`` is the same, bit for bit, on a GPU.
"""

import torch
from torch import Tensor

from ..spec import QuantSpec as QuantSpec
from . import reference
from .dispatch import Backend as Backend
from .dispatch import check_weight, grid_numbers, use_kernel
from .learned import fake_quant_learned as fake_quant_learned
from .learned import quantize_with as quantize_with


def _arguments(weight: Tensor, spec: QuantSpec, mask: Tensor | None) -> tuple[int, int, float, list[float]]:
    """What the back ends take of a spec, after checking weight and mask."""
    check_weight(weight, mask)
    return spec.bits, spec.group_width(weight.shape[1]), spec.divisor_value, grid_numbers(spec)


def fake_quant(weight: Tensor, spec: QuantSpec, *, mask: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """The weights as codes times scales, differentiable by the straight-through estimator.

    y = s * clamp(round(w * mask / s), qmin, qmax) with s = max|w * mask| / divisor of each group, rounded to its grid and
    taken as a constant; dL/dw = dL/dy * 1[qmin <= w / s <= qmax] * mask (``reference.py`` has every detail).

    Args:
        weight: [out, in], float32, bfloat16, float16 (computed in fp32) or float64 (computed in fp64, reference only);
            need not be contiguous.
        spec: The lattice; its group size divides ``in``.
        mask: bool [out, in], True where a weight is kept; pruned weights are zeros before scales are taken. None keeps all.
        backend: 'auto' is the Triton kernel on CUDA and the reference elsewhere; both give the same bits.

    Returns:
        [out, in] in the weight's dtype, contiguous. Zero groups give zeros; a group with a NaN or an infinity gives NaN
        (no host synchronisation: the loss shows it).

    Raises:
        ValueError: shape, dtype, mask, group size or back end do not fit.

    Source: Bengio et al., arXiv 1308.3432; Esser et al., arXiv 1902.08153, eq. 1 to 3.
    """
    arguments = _arguments(weight, spec, mask)
    if use_kernel(weight, backend):
        from . import kernel

        return kernel.fake_quant(weight, mask, *arguments)
    return reference.fake_quant(weight, mask, *arguments)[0]


def quantize(weight: Tensor, spec: QuantSpec, *, mask: Tensor | None = None, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Codes and scales of the weights: ``dequantize`` of them is ``fake_quant`` of the weights, bit for bit.

    Args:
        weight: [out, in], as in ``fake_quant``.
        spec: The lattice.
        mask: bool [out, in], True where a weight is kept, or None.
        backend: As in ``fake_quant``.

    Returns:
        (codes int8 [out, in] in [qmin, qmax], scales fp32 [out, in / group] on the spec's grid); zero groups have scale 1.

    Raises:
        ValueError: as in ``fake_quant``, or a weight is NaN or infinite (waits for the device to tell).
    """
    arguments = _arguments(weight, spec, mask)
    weight = weight.detach()
    implementation = reference
    if use_kernel(weight, backend):
        from . import kernel as implementation
    codes, scales = implementation.quantize(weight, mask, *arguments)
    broken = torch.isnan(scales)
    if bool(broken.any()):
        row, group = (int(i) for i in broken.nonzero()[0])
        raise ValueError(f"{int(broken.sum())} of {scales.numel()} groups hold NaN or infinite weights, first row {row} group {group}")
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """fp32 [out, in] = codes * scales, exact for codes of 8 bits or fewer and scales on a bf16 or fp16 grid.

    Args:
        codes: int8 [out, in].
        scales: fp32 [out, groups]; ``groups`` divides ``in``.

    Raises:
        ValueError: the shapes do not fit.
    """
    if codes.ndim != 2 or scales.ndim != 2 or scales.shape[0] != codes.shape[0] or not scales.shape[1] or codes.shape[1] % scales.shape[1]:
        raise ValueError(f"scales of shape {tuple(scales.shape)} do not fit codes of shape {tuple(codes.shape)}")
    grouped = codes.reshape(codes.shape[0], scales.shape[1], -1).to(torch.float32)
    return (grouped * scales.to(torch.float32).unsqueeze(-1)).view(codes.shape)
