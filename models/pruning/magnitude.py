"""Magnitude pruning: chooses the weights that stay, exactly how many, and how many at each optimizer step.

Masks are chosen on latent weights before any rounding: after int4 fake quantization a third of the magnitudes are equal. The threshold is
found by counting the bit patterns of fp32 magnitudes, which order like integers, in two passes over the weights and without a sort. So a
``global`` threshold needs no copy of all weights in one tensor.

Source: Zhu & Gupta 2017, "To prune, or not to prune" (schedule, equation 1).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..common.errors import NonFiniteError
from .selection import exact_count

_LEAST_KEPT = 0.05
"""Least share kept of each matrix with ``global`` scope (or ``keep``, if that is less): a layer without weights would cut the network."""
_LOW_BITS = 16  # fp32 magnitudes have 31 bits: 15 upper and 16 lower
_MISSING = -1  # sorts below every magnitude


def cubic_keep(step: int, total: int, keep: float, heal: float, update_every: int) -> float:
    """Share of weights kept after ``step`` optimizer steps; a pure function, so a resumed run needs no state.

    It is ``1 - (1 - keep) (1 - (1 - min(k, n) / n)^3)`` with ``k = step // update_every`` updates so far and ``n`` updates in the first
    ``1 - heal`` of the steps: 1.0 at step 0, and exactly ``keep`` from the last update on.

    Args:
        step: Completed optimizer steps, >= 0.
        total: Optimizer steps of the stage.
        keep: Final share kept, (0, 1].
        heal: Least share of the steps, at the end, with the final mask; [0, 1).
        update_every: Steps between updates; an interval longer than the ramp becomes one update at its end.
    """
    # 1e-9, so that a product such as 100 * 0.07 = 7.000000000000001 does not count as 8
    ramp = max(1, total - math.ceil(total * heal - 1e-9))
    interval = min(update_every, ramp)
    updates, last = step // interval, ramp // interval
    if updates >= last:
        # the mask is final from here on, and the rest of the stage heals
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
    """Masks (True = kept) of the largest magnitudes: exactly ``round(keep * numel)`` of them; of equal ones the first.

    Args:
        weights: Latent weights by name, any shape; compared in fp32.
        keep: Share of the weights kept, (0, 1].
        scope: ``layer`` counts within each matrix; ``global`` over all matrices, each divided by its mean magnitude (pruned weights count
            as zeros, so a matrix that has lost many loses fewer), and no matrix below 5 %.
        current: Masks of the same shapes; weights that they prune never return, even if more could be kept.

    Returns:
        Bool masks by name, with the shapes and devices of the weights.

    Raises:
        NonFiniteError: a weight is NaN or infinite; the message names the tensor.
    """
    masks = stream_masks(lambda name: (weights[name], None if current is None else current[name]), list(weights), keep, scope)
    return dict(masks)


def stream_masks(
    fetch: Callable[[str], tuple[Tensor, Tensor | None]], names: Sequence[str], keep: float, scope: Literal["layer", "global"]
) -> Iterator[tuple[str, Tensor]]:
    """``magnitude_masks``, one matrix at a time: at no time are two of them needed.

    Args:
        fetch: (latent weight, present mask or None) of a name; called once a matrix with ``layer``, four times with ``global``.
        names: The matrices, in the order in which equals are kept.
        keep, scope: As in ``magnitude_masks``.

    Yields:
        (name, bool mask of the weight's shape).
    """
    if scope == "layer":
        for name in names:
            weight, current = fetch(name)
            # one matrix alone: its threshold does not depend on the others
            score = _scores(name, weight, current)
            yield name, _largest([score], exact_count(keep, score.numel()))[0].view(weight.shape)
        return

    # global scope: count the patterns of all matrices, find the threshold, then make one mask after the other
    shapes: dict[str, torch.Size] = {}

    def patterns() -> Iterator[Tensor]:
        for name in names:
            weight, current = fetch(name)
            shapes[name] = weight.shape
            yield _bits(_normalised(_scores(name, weight, current), keep))

    # the patterns are computed anew in every pass: keeping them would take as much memory as all weights
    sizes = [(pattern.numel(), int((pattern >= 0).sum())) for pattern in patterns()]
    # weights that are pruned already cannot be kept again
    count = min(exact_count(keep, sum(size for size, _ in sizes)), sum(present for _, present in sizes))
    cut = _cut(patterns, count)
    for name, pattern in zip(names, patterns(), strict=True):
        mask, cut = _above(pattern, cut)
        yield name, mask.view(shapes[name])


def zero_masks(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks from the exact zeros of a sparse model: True where the weight is not zero."""
    return {name: weight.detach() != 0 for name, weight in weights.items()}


def sparsity(weights: Mapping[str, Tensor]) -> float:
    """Share of exact zeros over all elements of the weights; 0.0 without weights."""
    total = sum(weight.numel() for weight in weights.values())
    zeros = sum(weight.numel() - int(torch.count_nonzero(weight)) for weight in weights.values())
    return zeros / total if total else 0.0


def _scores(name: str, weight: Tensor, current: Tensor | None) -> Tensor:
    """|w| as a flat fp32 tensor, ``_MISSING`` where ``current`` prunes."""
    score = weight.detach().float().abs().flatten()
    if not bool(torch.isfinite(score).all()):
        raise NonFiniteError(f"{name} holds NaN or infinite weights: magnitudes cannot be compared; lower the learning rate")
    return score if current is None else torch.where(current.flatten(), score, _MISSING)


def _normalised(score: Tensor, keep: float) -> Tensor:
    """Scores divided by the matrix's mean magnitude; the least share that is kept of the matrix gets infinite scores."""
    present = score.clamp(min=0)
    # tiny: a matrix of zeros has no mean to divide by
    mean = present.mean(dtype=torch.float64).float().clamp(min=torch.finfo(torch.float32).tiny)
    # the largest 5 % of each matrix (or ``keep``, if that is less), which no threshold can remove
    protected = _largest([score], exact_count(min(_LEAST_KEPT, keep), score.numel()))[0]
    relative = torch.where(score < 0, score, (score / mean).clamp(max=torch.finfo(torch.float32).max))
    # infinity sorts above all finite scores, and its bit pattern too
    return torch.where(protected, torch.inf, relative)


def _bits(score: Tensor) -> Tensor:
    """Bit patterns of fp32 scores as int32. They order like the scores; missing ones (-1.0) are negative."""
    return score.contiguous().view(torch.int32)


def _largest(scores: list[Tensor], count: int) -> list[Tensor]:
    """Masks of the ``count`` largest scores over all tensors (or fewer, if fewer are present); of equal scores the first win."""
    bits = [_bits(score) for score in scores]
    cut = _cut(lambda: bits, min(count, sum(int((pattern >= 0).sum()) for pattern in bits)))
    masks = []
    for pattern in bits:
        mask, cut = _above(pattern, cut)
        masks.append(mask)
    return masks


def _above(pattern: Tensor, cut: tuple[int, int] | None) -> tuple[Tensor, tuple[int, int] | None]:
    """(mask of one tensor, cut for the next tensors): everything above the threshold, and the first ones equal to it."""
    if cut is None:
        return torch.zeros_like(pattern, dtype=torch.bool), None
    threshold, ties = cut
    mask = pattern > threshold
    # the first in the order of matrices and elements: the same choice on every machine
    equal = (pattern == threshold).nonzero().squeeze(1)[:ties]
    mask[equal] = True
    return mask, (threshold, ties - equal.numel())


def _cut(patterns: Callable[[], Iterable[Tensor]], count: int) -> tuple[int, int] | None:
    """(threshold, ties): everything above the threshold is kept, and ``ties`` of those equal to it; None if nothing is kept.

    ``patterns`` yields the tensors one by one and is called twice. Negative patterns are left out.
    """
    if count == 0:
        return None
    # first by the upper bits, then by the lower bits in the bucket found: one histogram of all patterns would have 2^31 entries
    high, above = _bucket(((pattern >> _LOW_BITS)[pattern >= 0] for pattern in patterns()), 1 << (31 - _LOW_BITS), count)
    inside = (pattern[(pattern >> _LOW_BITS) == high] & ((1 << _LOW_BITS) - 1) for pattern in patterns())
    low, above_inside = _bucket(inside, 1 << _LOW_BITS, count - above)
    # so many of the equal ones that exactly ``count`` are kept (law 4, docs/architecture.md)
    return (high << _LOW_BITS) | low, count - above - above_inside


def _bucket(values: Iterable[Tensor], buckets: int, count: int) -> tuple[int, int]:
    """(b, above): the bucket of the ``count``-th largest value, and the number of values in higher buckets."""
    histogram = torch.zeros(buckets, dtype=torch.int64)
    for value in values:
        # on the host: counting is exact in int64, and sums over matrices on several devices meet here
        histogram += torch.bincount(value, minlength=buckets).cpu()
    # [buckets]: how many values are in this bucket and all higher ones, from the highest on
    from_top = histogram.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, count))
    bucket = buckets - 1 - position
    return bucket, int(from_top[position] - histogram[bucket])
