"""Encodes weights as they are stored: codes, scales and, if the spec has them, zero points and a global scale; and decodes them."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import QuantSpec
from .absmax import quantize
from .dispatch import Backend
from .floats import float_codes, float_scales, float_values
from .learned import quantize_with
from .ranges import check_groups, range_grid
from .super_blocks import super_codes
from .super_reference import SubScales, decoded


class Encoded(NamedTuple):
    """A quantized weight [out, in]; ``decode`` gives its values."""

    codes: Tensor
    """[out, in]: int8 in [qmin, qmax] (int, q2_k to q6_k), uint8 in 0..15, one per byte (nf4, mxfp4, nvfp4), float8_e4m3fn (fp8_e4m3)."""
    scales: Tensor
    """fp32 of ``spec.scale_shape(out, in)``: on the spec's grid; powers of two (mxfp4); values of float8 e4m3 (nvfp4); fp16 numbers
    (q2_k to q6_k)."""
    zeros: Tensor | None = None
    """int8 in the shape of ``scales`` if the spec is not symmetric, else None."""
    global_scale: Tensor | None = None
    """fp32 [1] by which the scales are divided (nvfp4), else None."""
    sub: SubScales | None = None
    """What the sub-blocks store beside the scales (q2_k to q6_k), else None."""

    def to(self, device: torch.device | str) -> "Encoded":
        """The same on another device."""
        zeros, whole = (None if part is None else part.to(device) for part in (self.zeros, self.global_scale))
        return Encoded(self.codes.to(device), self.scales.to(device), zeros, whole, self.sub and self.sub.to(device))


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """fp32 [out, in] = (codes - zeros) * scales, exact for codes of 8 bits or fewer and scales on a bf16 or fp16 grid.

    Args:
        codes: int8 [out, in], or decoded values fp32 of codes that are not integers.
        scales: fp32 [out, groups], ``groups`` divides ``in``; or [1, 1] for the whole tensor.
        zeros: int8 zero points in the shape of ``scales``; None for symmetric codes.

    Raises:
        ValueError: the shapes do not fit.
    """
    per_row = codes.ndim == 2 and scales.ndim == 2 and scales.shape[0] == codes.shape[0]
    if tuple(scales.shape) != (1, 1) and not (per_row and scales.shape[1] and codes.shape[1] % scales.shape[1] == 0):
        raise ValueError(f"scales of shape {tuple(scales.shape)} do not fit codes of shape {tuple(codes.shape)}")
    if zeros is not None and zeros.shape != scales.shape:
        raise ValueError(f"zeros of shape {tuple(zeros.shape)} do not fit scales of shape {tuple(scales.shape)}")
    # [out, in] -> [out, groups, group size], or [1, 1, out * in] with one scale for the matrix
    grouped = codes.reshape(*scales.shape, codes.numel() // max(1, scales.numel())).to(torch.float32)
    if zeros is not None:
        # in fp32: q - z of two int8 numbers may need 9 bits
        grouped = grouped - zeros.to(torch.float32).unsqueeze(-1)
    return (grouped * scales.to(torch.float32).unsqueeze(-1)).view(codes.shape)


@torch.no_grad()
def encode(
    weight: Tensor, spec: QuantSpec, *, mask: Tensor | None = None, whole: Tensor | None = None, backend: Backend = "auto"
) -> Encoded:  # fmt: skip
    """Encodes weights for every spec; ``decode`` of the result equals ``fake_quant`` of the weights, bit for bit.

    Args:
        weight, spec, mask, whole, backend: As in ``fake_quant``.

    Raises:
        ValueError: as in ``fake_quant``, or a weight is NaN or infinite (the check waits for the device).
    """
    if spec.super_block:
        codes, scales, sub = super_codes(weight, spec, mask, backend)
        return Encoded(codes, scales, sub=sub)
    if spec.kind != "int":
        # nvfp4 stores e4m3 scales and one global scale, and divides by their quotient; for the other kinds ``divides`` equals ``stored``
        divides, stored, used = float_scales(weight, spec, mask, whole)
        # a NaN or infinite weight shows in the scale of its group, and codes cannot hold it
        check_groups(divides)
        codes = float_codes(weight, divides, spec, mask)
        return Encoded(codes, stored, global_scale=used if spec.kind == "nvfp4" else None)
    if spec.symmetric:
        return Encoded(*quantize(weight, spec, mask=mask, backend=backend))
    scale, zeros = range_grid(weight, spec, mask, backend)
    check_groups(scale)
    codes, scales = quantize_with(weight, scale, spec, zeros=zeros, mask=mask, backend=backend)
    return Encoded(codes, scales, zeros)


def decode(encoded: Encoded, spec: QuantSpec) -> Tensor:
    """fp32 [out, in]: the values that ``encode`` stored under the same spec."""
    if spec.kind == "int":
        return dequantize(encoded.codes, encoded.scales, encoded.zeros)
    if encoded.sub is not None:
        return decoded(encoded.codes, encoded.scales, encoded.sub)
    # the quotient by which ``encode`` divided (``float_reference.scales``)
    scales = encoded.scales if encoded.global_scale is None else encoded.scales / encoded.global_scale
    return dequantize(float_values(encoded.codes, spec.kind), scales)
