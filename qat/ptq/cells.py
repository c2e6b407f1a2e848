"""Latent weights for codes that were chosen otherwise than by rounding them to nearest."""

import torch
from torch import Tensor

from ..fake_quant import Encoded, dequantize
from ..spec import QuantSpec

_MARGIN = 0.02  # of a step: rounding a latent weight again must not depend on the last bit of a division


@torch.no_grad()
def into_cells(weight: Tensor, encoded: Encoded, spec: QuantSpec) -> Tensor:
    """The weights nearest to ``weight`` that round to ``codes``: training starts at the codes, and keeps what they had left of the weights.

    Args:
        weight: fp32 [out, in].
        encoded: Codes int8 [out, in] with their scales and zero points.
        spec: Their lattice, of kind int.

    Returns:
        fp32 [out, in]; inside the lattice's limits, beyond which weights get no gradient. Exact zeros with code 0 stay zero.
    """
    codes, scales, zeros, _ = encoded
    middle, wide = dequantize(codes, scales, zeros), dequantize(torch.ones_like(codes), scales)
    half = (0.5 - _MARGIN) * wide
    # the lattice's ends, seen from its zero point
    low, high = (dequantize(torch.full_like(codes, end), scales, zeros) for end in (spec.qmin, spec.qmax))
    return torch.clamp(weight, middle - half, middle + half).clamp(low, high)
