"""Fake quantization, codes and values of the kinds that are not integers: nf4, fp8_e4m3, mxfp4, nvfp4."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..fake_quant import float_reference as reference
from ..spec import QuantSpec
from .dispatch import check_weight, grid_numbers, use_kernel


def float_scales(
    weight: Tensor, spec: QuantSpec, mask: Tensor | None, whole: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(divisor s, stored scales, global scale [1]), without gradients; see ``float_reference.scales``."""
    check_weight(weight, mask)
    shared = spec.group_size == "tensor"
    return reference.scales(weight.detach(), mask, spec.kind, spec.group_width(weight.shape[1]), shared, grid_numbers(spec), whole)


@torch.no_grad()
def shared_global_scale(weights: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """fp32 [1]: one nvfp4 global scale for several (weight, mask), from the largest magnitude of all; NaN if a weight is NaN."""
    kept = [(weight if mask is None else weight * mask).detach().to(torch.float32) for weight, mask in weights]
    # an empty weight has no largest magnitude
    return reference.global_scale(
        torch.stack([one.abs().amax() if one.numel() else one.new_zeros(()) for one in kept]).amax(0, keepdim=True)
    )


def fake_quant_float(weight: Tensor, scale: Tensor, mask: Tensor | None, kind: str, width: int, backend: str) -> Tensor:
    """y [out, in] with given scales fp32, one per ``width`` inputs or one in total; differentiable in the weight."""
    if use_kernel(weight, backend):
        from ..fake_quant import float_kernel

        return float_kernel.fake_quant(weight, scale, mask, kind, width)
    return reference.fake_quant(weight, scale, mask, kind, width)[0]


def float_codes(weight: Tensor, scale: Tensor, spec: QuantSpec, mask: Tensor | None) -> Tensor:
    """Codes [out, in] with given scales: uint8 in 0..15, or float8_e4m3fn, whose values are the codes."""
    values, _ = reference.rounded(weight.detach(), scale, mask, spec.kind, spec.group_width(weight.shape[1]))
    return codes_of(values.view(weight.shape), spec.kind)


def codes_of(values: Tensor, kind: str) -> Tensor:
    """The codes of ``float_codes`` of numbers of the code book, fp32 of any shape; overwrites ``values``."""
    # + 0 turns -0 into +0
    values = values.add_(0.0)
    if kind == "fp8_e4m3":
        return values.to(torch.float8_e4m3fn)
    if kind == "nf4":
        # the values are numbers of the table, and bucketize gives such a number its own index
        return torch.bucketize(values, values.new_tensor(reference.NF4)).to(torch.uint8)
    magnitude = torch.bucketize(values.abs(), values.new_tensor(reference.E2M1))
    # sign and magnitude: bit 3 is the sign (OCP MX v1.0, e2m1)
    return (magnitude + 8 * (values < 0)).to(torch.uint8)


def float_values(codes: Tensor, kind: str) -> Tensor:
    """The fp32 values of codes of ``float_codes``, before scaling."""
    if kind == "fp8_e4m3":
        return codes.to(torch.float32)
    # the second half of e2m1 has the sign bit set
    table = reference.NF4 if kind == "nf4" else (*reference.E2M1, *(-value for value in reference.E2M1))
    return torch.tensor(table, dtype=torch.float32, device=codes.device)[codes.long()]
