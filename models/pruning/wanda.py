"""Wanda: a weight counts as much as its magnitude times the size of its input; each output row keeps its own largest.

    S_ij = |W_ij| ||X_j||_2

over the tokens of the calibration text. Weights that stay keep their values.

Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695), section 3.
"""

import torch
from torch import Tensor

from .pattern import Pattern
from .selection import exact_count, finite, largest_in_rows, pattern_mask


@torch.no_grad()
def wanda_mask(
    name: str, weight: Tensor, hessian: Tensor, keep: float, pattern: Pattern | None = None, allowed: Tensor | None = None
) -> Tensor:
    """Mask (bool [out, in], True = kept) of one linear.

    Args:
        name: Name of the weight, for messages.
        weight: [out, in].
        hessian: fp32 [in, in], 2/N sum x x^T. Its diagonal is ||X_j||^2 times a constant, which changes no order.
        keep: Share of each row that stays: exactly ``round(keep * in)`` weights, at least one.
        pattern: N:M in place of ``keep``.
        allowed: bool [out, in]; other weights are zero already and stay so.

    Raises:
        NonFiniteError: weights or scores are NaN or infinite.
    """
    scores = finite(name, weight.detach().float().abs() * hessian.diagonal().sqrt())
    if pattern is not None:
        return pattern_mask(scores, pattern, allowed)
    return largest_in_rows(scores, exact_count(keep, weight.shape[1]), allowed)
