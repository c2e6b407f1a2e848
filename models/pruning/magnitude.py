"""Magnitude pruning: which single weights stay, exactly how many, and how many at which optimizer step.

Masks are chosen on latent weights, before any rounding: after int4 fake-quant a third of the magnitudes tie. The cut is found by
counting the bit patterns of fp32 magnitudes (they order like integers), two passes over the weights and no sort, so a ``global`` cut
needs no copy of all weights in one tensor.

Source: Zhu & Gupta 2017, "To prune, or not to prune" (schedule, equation 1).
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ..errors import NonFiniteError

_LEAST_KEPT = 0.05
"""With ``global`` scope no matrix falls below this share (or ``keep``, when that is less): a layer cut to nothing cuts the network."""
_LOW_BITS = 16
_MISSING = -1


def cubic_keep(step: int, total: int, keep: float, heal: float, update_every: int) -> float:
    """Share of weights that stays after ``step`` optimizer steps; a pure function, so a resumed run needs no state.

    ``1 - (1 - keep) (1 - (1 - min(k, n) / n)^3)`` with ``k = step // update_every`` updates so far and ``n`` updates in the first
    ``1 - heal`` of the steps: 1.0 at step 0, ``keep`` exactly from the last update on.

    Args:
        step: Completed optimizer steps, >= 0.
        total: Optimizer steps of the stage.
        keep: Final share kept, (0, 1].
        heal: Share of the steps at the end with the final mask, at least; [0, 1).
        update_every: Steps between updates; an interval longer than the ramp becomes one update at its end.
    """
    ramp = max(1, total - math.ceil(total * heal - 1e-9))
    interval = min(update_every, ramp)
    updates, last = step // interval, ramp // interval
    if updates >= last:
        return keep
    if updates <= 0:
        return 1.0
    return 1.0 - (1.0 - keep) * (1.0 - (1.0 - updates / last) ** 3)


def magnitude_masks(
    weights: Mapping[str, Tensor],
    keep: float,
    scope: Literal["layer", "global"],
    current: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Masks (True = stays) of the largest magnitudes: exactly ``round(keep * numel)`` of them, the first of equals.

    Args:
        weights: Latent weights by name, any shape; compared in fp32.
        keep: Share of the weights that stays, (0, 1].
        scope: ``layer`` counts inside each matrix; ``global`` over all, each divided by its mean magnitude (pruned weights count as
            zeros, so a matrix that lost much is spared more and more), and no matrix below 5 %.
        current: Masks of the same shapes; what they prune never returns, even when more could be kept.

    Returns:
        Bool masks by name, shapes and devices of the weights.

    Raises:
        NonFiniteError: a weight is NaN or infinite; the message names the tensor.
    """
    scores = {name: _scores(name, weight, None if current is None else current[name]) for name, weight in weights.items()}
    if scope == "layer":
        flat = {name: _largest([score], _count(keep, score.numel()))[0] for name, score in scores.items()}
    else:
        for name, score in scores.items():
            scores[name] = _normalised(score, keep)
        chosen = _largest(list(scores.values()), _count(keep, sum(score.numel() for score in scores.values())))
        flat = dict(zip(scores, chosen, strict=True))
    return {name: mask.view(weights[name].shape) for name, mask in flat.items()}


def zero_masks(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks that a sparse model's exact zeros stand for: True where the weight is not zero."""
    return {name: weight.detach() != 0 for name, weight in weights.items()}


def sparsity(weights: Mapping[str, Tensor]) -> float:
    """Share of exact zeros over all elements of the weights; 0.0 when there are none."""
    total = sum(weight.numel() for weight in weights.values())
    zeros = sum(weight.numel() - int(torch.count_nonzero(weight)) for weight in weights.values())
    return zeros / total if total else 0.0


def _count(keep: float, total: int) -> int:
    return min(total, max(1, round(keep * total)))


def _scores(name: str, weight: Tensor, current: Tensor | None) -> Tensor:
    """|w| as a flat fp32 tensor, ``_MISSING`` where ``current`` prunes."""
    score = weight.detach().float().abs().flatten()
    if not bool(torch.isfinite(score).all()):
        raise NonFiniteError(f"{name} holds NaN or infinite weights: magnitudes cannot be compared; lower the learning rate")
    return score if current is None else torch.where(current.flatten(), score, _MISSING)


def _normalised(score: Tensor, keep: float) -> Tensor:
    """Scores divided by the matrix's mean magnitude; the share that it keeps in any case is lifted above all others."""
    present = score.clamp(min=0)
    mean = present.mean(dtype=torch.float64).float().clamp(min=torch.finfo(torch.float32).tiny)
    protected = _largest([score], _count(min(_LEAST_KEPT, keep), score.numel()))[0]
    relative = torch.where(score < 0, score, (score / mean).clamp(max=torch.finfo(torch.float32).max))
    return torch.where(protected, torch.inf, relative)


def _largest(scores: list[Tensor], count: int) -> list[Tensor]:
    """Masks of the ``count`` largest scores over all tensors, fewer when fewer are there; ties go to the first in order."""
    bits = [score.contiguous().view(torch.int32) for score in scores]
    count = min(count, sum(int((pattern >= 0).sum()) for pattern in bits))
    if count == 0:
        return [torch.zeros_like(pattern, dtype=torch.bool) for pattern in bits]
    threshold, ties = _cut(bits, count)
    masks = []
    for pattern in bits:
        mask = pattern > threshold
        equal = (pattern == threshold).nonzero().squeeze(1)[:ties]
        mask[equal] = True
        ties -= equal.numel()
        masks.append(mask)
    return masks


def _cut(bits: list[Tensor], count: int) -> tuple[int, int]:
    """(threshold, ties): everything above the threshold stays, and ``ties`` of those equal to it. Negative patterns are left out."""
    high, above = _bucket([(pattern >> _LOW_BITS)[pattern >= 0] for pattern in bits], 1 << (31 - _LOW_BITS), count)
    inside = [pattern[(pattern >> _LOW_BITS) == high] & ((1 << _LOW_BITS) - 1) for pattern in bits]
    low, above_inside = _bucket(inside, 1 << _LOW_BITS, count - above)
    return (high << _LOW_BITS) | low, count - above - above_inside


def _bucket(values: list[Tensor], buckets: int, count: int) -> tuple[int, int]:
    """(b, above): the bucket that holds the ``count``-th largest value, and how many values lie in higher buckets."""
    histogram = sum(torch.bincount(value, minlength=buckets).cpu() for value in values)
    assert isinstance(histogram, Tensor)
    from_top = histogram.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, count))
    bucket = buckets - 1 - position
    return bucket, int(from_top[position] - histogram[bucket])
