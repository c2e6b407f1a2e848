"""AWQ's clipping: how far the largest magnitude of each group is cut, so that the other weights are rounded more finely.

Source: the code of Lin et al., arXiv 2306.00978: ten steps down to one half, judged by the outputs of the group alone, not for queries
and keys, whose product is what counts.
"""

import torch
from torch import Tensor

from ...models.axis_map import Family
from ..fake_quant import decode, encode
from ..spec import QuantSpec

SHARES = tuple(1 - step / 20 for step in range(11))
"""Shares of the largest magnitude that are tried."""


def is_clipped(family: Family, module: str) -> bool:
    """Whether a matrix of a layer is clipped: all but those that make queries or keys."""
    out, inner = family.matrices[module]
    makes_heads = inner == "hidden" and "heads" in out
    # values alone; a fused matrix has queries and keys in it
    return not makes_heads or (module == family.value and "+" not in out)


def clip(weight: Tensor, spec: QuantSpec, moments: Tensor, mask: Tensor | None) -> Tensor:
    """The weight with each group cut where that lowers the error of the outputs of its rounding; of equals the smallest cut.

    Args:
        weight: fp32 [out, in].
        spec: How it will be rounded.
        moments: fp32 [in, in]: second moments of its inputs.
        mask: bool [out, in], True where a weight is kept; None keeps all.
    """
    out, width = weight.shape
    group = spec.group_width(width)
    groups = weight.reshape(out, -1, group)
    # the diagonal blocks of H: [groups, group, group]
    blocks = torch.stack([moments[at : at + group, at : at + group] for at in range(0, width, group)])
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if spec.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best, least = groups.clone(), None
    for share in SHARES:
        cut = torch.maximum(torch.minimum(groups, high * share), low * share)
        values = decode(encode(cut.reshape(out, width).contiguous(), spec, mask=mask), spec).reshape(groups.shape)
        off = values - groups
        errors = (torch.einsum("ogi,gij->ogj", off, blocks) * off).sum(-1)
        if spec.group_size == "tensor":
            # one scale: all groups are cut alike
            errors = errors.sum().expand_as(errors)
        better = torch.ones_like(errors, dtype=torch.bool) if least is None else errors < least
        best = torch.where(better[..., None], cut, best)
        least = errors if least is None else torch.where(better, errors, least)
    return best.reshape(out, width)
