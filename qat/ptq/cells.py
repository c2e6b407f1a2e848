"""Latent weights for codes that were chosen otherwise than by rounding them to nearest."""

import torch
from torch import Tensor

from ..fake_quant import dequantize
from ..spec import QuantSpec

_MARGIN = 0.02  # of a step: rounding a latent weight again must not depend on the last bit of a division


@torch.no_grad()
def into_cells(weight: Tensor, codes: Tensor, scales: Tensor, spec: QuantSpec) -> Tensor:
    """The weights nearest to ``weight`` that round to ``codes``: training starts at the codes, and keeps what they had left of the weights.

    Args:
        weight: fp32 [out, in].
        codes: int8 [out, in].
        scales: fp32 [out, groups], on their grid.
        spec: Their lattice.

    Returns:
        fp32 [out, in]; inside the lattice's limits, beyond which weights get no gradient. Exact zeros with code 0 stay zero.
    """
    middle = dequantize(codes, scales)
    wide = scales.repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)
    half = (0.5 - _MARGIN) * wide
    return torch.clamp(weight, middle - half, middle + half).clamp(spec.qmin * wide, spec.qmax * wide)
