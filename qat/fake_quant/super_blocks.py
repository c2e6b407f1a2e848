"""Fake quantization, codes and values of the kinds with super-blocks, q2_k to q6_k."""

import torch
from torch import Tensor

from ..fake_quant import super_reference as reference
from ..spec import QuantSpec
from ..super_blocks import no_zero
from .dispatch import check_weight
from .ranges import check_groups
from .super_reference import SubScales


def check_super(weight: Tensor, spec: QuantSpec, mask: Tensor | None, backend: str) -> None:
    """Check the arguments of an op on super-blocks.

    Raises:
        ValueError: shape, dtype or mask do not fit; pruned weights under a kind whose values need not hold 0; or the back end is 'triton'.
    """
    check_weight(weight, mask)
    spec.group_width(weight.shape[1])
    if mask is not None and not spec.holds_zero:
        raise ValueError(no_zero(spec.kind))
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend={backend!r} has no kernel for kind={spec.kind!r}; use backend='auto', which is plain PyTorch for it")


def fake_quant_super(weight: Tensor, spec: QuantSpec, mask: Tensor | None, backend: str) -> Tensor:
    """y [out, in] with scales from the weights; differentiable in the weight."""
    check_super(weight, spec, mask, backend)
    return reference.fake_quant(weight, mask, spec.kind)[0]


def super_codes(weight: Tensor, spec: QuantSpec, mask: Tensor | None, backend: str) -> tuple[Tensor, Tensor, SubScales]:
    """Codes int8 [out, in], d fp32 [out, in / 256] and sub-scales, from the weights; ValueError also if one is not finite."""
    check_super(weight, spec, mask, backend)
    kept = reference.kept_weights(weight.detach(), mask)
    scale, sub = reference.scales_of_weight(kept, spec.kind)
    check_groups(scale)
    return super_codes_with(kept, scale, sub, spec), scale, sub


def super_codes_with(weight: Tensor, scale: Tensor, sub: SubScales, spec: QuantSpec) -> Tensor:
    """Codes int8 [out, in] of weights fp32, rounded to nearest with given scales."""
    codes, _, _ = reference.rounded(weight, scale, sub, spec.kind)
    return codes.to(torch.int8).view(weight.shape)
