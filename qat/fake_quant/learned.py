"""Fake quantization with given scales, which are learned (LSQ), calibrated or searched."""

import math

import torch
from torch import Tensor

from ..fake_quant import learned_reference as reference
from ..spec import QuantSpec
from .dispatch import Backend, check_weight, grid_numbers, use_kernel


def _arguments(
    weight: Tensor, scale: Tensor, spec: QuantSpec, mask: Tensor | None, zeros: Tensor | None
) -> tuple[Tensor | None, Tensor | None, int, int, list[float]]:
    """(mask, zeros, bits, width, grid) as the back ends take them, after checking that the tensors fit."""
    check_weight(weight, mask)
    if spec.kind != "int":
        raise ValueError(f"given scales need kind='int'; the scales of kind={spec.kind!r} come from the weights, by fake_quant")
    # [out, groups], or [1, 1] for one scale
    shape = spec.scale_shape(*weight.shape)
    if scale.dtype != torch.float32 or tuple(scale.shape) != shape or scale.device != weight.device:
        raise ValueError(
            f"scale must be float32 of shape {shape} on {weight.device} for a weight of shape {tuple(weight.shape)}; "
            f"got {scale.dtype} of shape {tuple(scale.shape)} on {scale.device}"
        )
    if spec.symmetric and zeros is not None:
        raise ValueError("zeros are given, but the spec is symmetric and has no zero point; leave them out or set symmetric=false")
    if not spec.symmetric and zeros is None:
        raise ValueError(f"a spec with symmetric=false needs zeros: int8 of shape {shape}, as encode() returns them")
    if zeros is not None and (zeros.dtype != torch.int8 or tuple(zeros.shape) != shape or zeros.device != weight.device):
        raise ValueError(
            f"zeros must be int8 of shape {shape} on {weight.device}; got {zeros.dtype} of shape {tuple(zeros.shape)} on {zeros.device}"
        )
    return mask, zeros, spec.code_bits, spec.group_width(weight.shape[1]), grid_numbers(spec)


def group_factor(weight: Tensor, scale: Tensor, spec: QuantSpec) -> float:
    """1 / sqrt(N qmax) with N weights per scale, the factor on the gradient of a scale (LSQ, section 2.2)."""
    # max: an empty weight has no group
    return 1.0 / math.sqrt(max(1, weight.numel() // max(1, scale.numel())) * spec.qmax)


def scale_on_grid(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Scales of any shape rounded to the spec's grid, fp32, without a gradient; NaN for NaN and infinity."""
    return reference.on_grid(scale, grid_numbers(spec))


def fake_quant_learned(
    weight: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    *,
    zeros: Tensor | None = None,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The weights as codes times given scales, differentiable in both (LSQ).

    y = s * clamp(round(w * mask / s), qmin - z, qmax - z) with s = ``scale`` rounded to the spec's grid, straight through.
    dL/dw = dL/dy * 1[qmin - z <= w / s <= qmax - z] * mask; dL/dscale is the LSQ gradient times 1 / sqrt(N * qmax), N = the number
    of weights that share the scale (details in ``learned_reference.py``). A scale or weight without ``requires_grad`` costs nothing in the
    backward pass.

    Args:
        weight: [out, in], as in ``fake_quant``.
        scale: fp32 of ``spec.scale_shape(out, in)``, positive; usually a parameter that starts as ``quantize(weight, spec)[1]``.
            Values outside the grid's limits act as the nearest limit.
        spec: The quantization spec, kind 'int'. Its divisor is not used.
        zeros: int8 in the shape of ``scale``, the zero points of a spec with symmetric=False; constants.
        mask: bool [out, in], True where a weight is kept; None keeps all.
        backend: As in ``fake_quant``. Values and weight gradients of both back ends are equal bit for bit, scale gradients to about 1e-7 of
            the sum of their terms' magnitudes; each back end gives the same bits in every run.

    Returns:
        [out, in] in the weight's dtype, contiguous; NaN where the weight or its scale is NaN or infinite.

    Raises:
        ValueError: shape, dtype, device, mask, zeros, group size or back end do not fit.

    Source: Esser et al., arXiv 1902.08153, eq. 1 to 3 and section 2.2.
    """
    arguments = _arguments(weight, scale, spec, mask, zeros)
    # keeps the steps of a scale and of its weights in proportion, whatever the group size (LSQ, section 2.2)
    factor = group_factor(weight, scale, spec)
    if use_kernel(weight, backend):
        from ..fake_quant import learned_kernel

        return learned_kernel.fake_quant(weight, scale, *arguments, factor)
    return reference.fake_quant(weight, scale, *arguments, factor)


@torch.no_grad()
def quantize_with(
    weight: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    *,
    zeros: Tensor | None = None,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Codes and rounded scales of ``fake_quant_learned``; ``dequantize(codes, scales, zeros)`` equals its value, bit for bit.

    Args:
        weight, scale, spec, zeros, mask, backend: As in ``fake_quant_learned``.

    Returns:
        (codes int8 [out, in] in [qmin, qmax], scales fp32 in the shape of ``scale``, on the spec's grid).

    Raises:
        ValueError: as in ``fake_quant_learned``, or a weight or scale is NaN or infinite (the check waits for the device).
    """
    arguments = _arguments(weight, scale, spec, mask, zeros)
    # checked before rounding, because codes cannot hold NaN: int8 of NaN is undefined
    scales = reference.on_grid(scale, arguments[-1])
    for name, tensor in (("weight", weight), ("scale", scales)):
        broken = ~torch.isfinite(tensor)
        if bool(broken.any()):
            row, column = (int(i) for i in broken.nonzero()[0])
            raise ValueError(f"{int(broken.sum())} of {tensor.numel()} {name}s are NaN or infinite, first at [{row}, {column}]")
    implementation = reference
    if use_kernel(weight, backend):
        from ..fake_quant import learned_kernel as implementation
    return implementation.quantize(weight, scale, *arguments), scales
