"""Masks of the largest scores: exactly so many in a row, in a group of a row, or in a matrix; of equal scores the first stays."""

import torch
from torch import Tensor

from ..common.errors import NonFiniteError
from .pattern import Pattern

_PIECE = 2**24  # elements that are sorted at a time


def exact_count(keep: float, total: int) -> int:
    """``keep`` of ``total`` as a whole number; at least one weight stays."""
    return min(total, max(1, round(keep * total)))


def largest_in_rows(scores: Tensor, count: int, allowed: Tensor | None = None) -> Tensor:
    """Mask (True = kept) of the ``count`` largest scores of each row, or fewer where fewer are allowed.

    Args:
        scores: [rows, columns], any strides, no NaN; the first of equal scores in a row is kept.
        count: Scores kept in each row.
        allowed: bool [rows, columns]; the others are never kept. None allows all.
    """
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    rows = max(1, _PIECE // max(1, scores.shape[1]))
    for at in range(0, len(scores), rows):
        # stable: equal scores keep the order of their columns
        order = torch.sort(scores[at : at + rows], dim=1, descending=True, stable=True).indices
        mask[at : at + rows].scatter_(1, order[:, :count], True)
    # -inf may be among the largest where little is allowed
    return mask if allowed is None else mask & allowed


def largest(scores: Tensor, count: int, allowed: Tensor | None = None) -> Tensor:
    """``largest_in_rows`` over all elements together, in the order of their rows; ``scores`` of any shape."""
    flat = None if allowed is None else allowed.reshape(1, -1)
    return largest_in_rows(scores.reshape(1, -1), count, flat).view(scores.shape)


def pattern_mask(scores: Tensor, pattern: Pattern, allowed: Tensor | None = None) -> Tensor:
    """Mask of the ``pattern.kept`` largest scores of every ``pattern.group`` consecutive columns of each row.

    Args:
        scores: [out, in], in a multiple of the group; no NaN.
        pattern: N:M.
        allowed: As in ``largest_in_rows``.
    """
    groups = (-1, pattern.group)
    return largest_in_rows(
        scores.reshape(groups), pattern.kept, None if allowed is None else allowed.reshape(groups)
    ).view(scores.shape)  # fmt: skip


def magnitude_pattern_mask(name: str, weight: Tensor, pattern: Pattern, allowed: Tensor | None = None) -> Tensor:
    """``pattern_mask`` of the largest magnitudes; NonFiniteError, which names the weight, if one is NaN or infinite."""
    return pattern_mask(magnitude_scores(name, weight), pattern, allowed)


def magnitude_scores(name: str, weight: Tensor) -> Tensor:
    """|w| in fp32.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
    """
    return finite(name, weight.detach().float().abs())


def finite(name: str, scores: Tensor) -> Tensor:
    """``scores``; NonFiniteError, which names the weight, if one is NaN or infinite."""
    if not bool(torch.isfinite(scores).all()):
        raise NonFiniteError(f"{name} holds NaN or infinite weights, which cannot be compared; take an earlier checkpoint")
    return scores


def follows(weight: Tensor, pattern: Pattern) -> bool:
    """Whether no group of [out, in] holds more than ``pattern.kept`` weights that are not zero."""
    if weight.shape[1] % pattern.group:
        return False
    return bool(((weight != 0).reshape(-1, pattern.group).sum(1) <= pattern.kept).all())
