"""Fake quantization with scales computed from the weights: from the absmax of each group, or from its range."""

from torch import Tensor

from ..fake_quant import absmax_reference as reference
from ..spec import QuantSpec
from .dispatch import Backend, check_weight, grid_numbers, use_kernel
from .floats import fake_quant_float, float_scales
from .learned import fake_quant_learned, quantize_with
from .ranges import check_groups, range_grid
from .super_blocks import fake_quant_super


def _arguments(weight: Tensor, spec: QuantSpec, mask: Tensor | None) -> tuple[int, int, float, list[float]]:
    """The arguments of the back ends from a spec, after checking weight and mask."""
    check_weight(weight, mask)
    return spec.code_bits, spec.group_width(weight.shape[1]), spec.divisor_value, grid_numbers(spec)


def fake_quant(
    weight: Tensor, spec: QuantSpec, *, mask: Tensor | None = None, whole: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:  # fmt: skip
    """The weights as codes times scales, differentiable by the straight-through estimator.

    y = s * clamp(round(w * mask / s), qmin, qmax) with s = max|w * mask| / divisor per group, rounded to its grid and taken as a constant;
    dL/dw = dL/dy * 1[qmin <= w / s <= qmax] * mask (details in ``absmax_reference.py``). With symmetric=False scale and zero point come
    from the group's range (``range_reference.py``); kinds other than int have their own code books and scales (``float_reference.py``,
    ``super_reference.py``).

    Args:
        weight: [out, in], float32, bfloat16, float16 (computed in fp32) or float64 (computed in fp64, reference only);
            need not be contiguous.
        spec: The quantization spec; its group size divides ``in``.
        mask: bool [out, in], True where a weight is kept; pruned weights are set to zero before scales are taken. None keeps all.
        whole: nvfp4: fp32 [1], a global scale that several weights share (``shared_global_scale``); None = that of this weight.
        backend: 'auto' is the Triton kernel on CUDA and the reference elsewhere; both give the same bits.

    Returns:
        [out, in] in the weight's dtype, contiguous. Zero groups give zeros; a group with a NaN or an infinity gives NaN
        (no host synchronisation: the loss shows it).

    Raises:
        ValueError: shape, dtype, mask, group size or back end do not fit.

    Source: Bengio et al., arXiv 1308.3432; Esser et al., arXiv 1902.08153, eq. 1 to 3.
    """
    # two levels of scales, found together
    if spec.super_block:
        return fake_quant_super(weight, spec, mask, backend)
    # floats and quantiles: code books and scales of their own
    if spec.kind != "int":
        scale, _, _ = float_scales(weight, spec, mask, whole)
        return fake_quant_float(weight, scale, mask, spec.kind, spec.group_width(weight.shape[1]), backend)
    # zero points, or one scale for the matrix: the range is found first, and its scales then act as given ones. They have no gradient,
    # because ``range_grid`` runs under no_grad
    if not spec.symmetric or spec.group_size == "tensor":
        scale, zeros = range_grid(weight, spec, mask, backend)
        return fake_quant_learned(weight, scale, spec, zeros=zeros, mask=mask, backend=backend)
    # symmetric groups and rows: one op finds the scales and applies them, so no scale is kept for the backward pass
    arguments = _arguments(weight, spec, mask)
    if use_kernel(weight, backend):
        from ..fake_quant import absmax_kernel as kernel

        return kernel.fake_quant(weight, mask, *arguments)
    return reference.fake_quant(weight, mask, *arguments)


def quantize(weight: Tensor, spec: QuantSpec, *, mask: Tensor | None = None, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Codes and scales of the weights; ``dequantize`` of them equals ``fake_quant`` of the weights, bit for bit.

    Args:
        weight: [out, in], as in ``fake_quant``.
        spec: The quantization spec.
        mask: bool [out, in], True where a weight is kept, or None.
        backend: As in ``fake_quant``.

    Returns:
        (codes int8 [out, in] in [qmin, qmax], scales fp32 of ``spec.scale_shape(out, in)`` on the spec's grid); zero groups have scale 1.

    Raises:
        ValueError: as in ``fake_quant``, or a weight is NaN or infinite (the check waits for the device).
    """
    if spec.kind != "int":
        what = "come with sub-scales" if spec.super_block else "are not int8"
        raise ValueError(f"codes of kind={spec.kind!r} {what}; call encode() instead of quantize()")
    if not spec.symmetric:
        raise ValueError("codes of a spec with symmetric=false come with zero points; call encode() instead of quantize()")
    # one scale for the matrix comes from its range, as in ``fake_quant``
    if spec.group_size == "tensor":
        scale, _ = range_grid(weight, spec, mask, backend)
        check_groups(scale)
        return quantize_with(weight, scale, spec, mask=mask, backend=backend)
    arguments = _arguments(weight, spec, mask)
    # codes are integers: no gradient passes through them
    weight = weight.detach()
    implementation = reference
    if use_kernel(weight, backend):
        from ..fake_quant import absmax_kernel as implementation
    codes, scales = implementation.quantize(weight, mask, *arguments)
    check_groups(scales)
    return codes, scales
