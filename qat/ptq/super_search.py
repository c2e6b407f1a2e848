"""Searches the scales of super-blocks (``../super_blocks.py``) that have the smallest squared rounding error.

The error is sum_j h_j (w_j - y_j)^2 with h = 1, or with the importance of each input. For every super-block:

    1. each sub-block alone, with real numbers s and n for S and M: codes of the range times a factor, then s and n fitted to these codes
       by least squares; of all factors the pair with the least error stays
    2. d and dmin from the largest of them, the integers sc and m rounded to nearest, as in ``fake_quant/super_reference.py``
    3. sc and m of each sub-block moved by one, where that lowers the error with the codes that belong to them
    4. d and dmin fitted to codes and integers by least squares, rounded to fp16, kept where the error of the super-block falls

Steps 3 and 4 are repeated. All compared errors are of stored numbers, so the result is never worse than step 2, which in turn replaces
rounding to nearest only where it is better.

Source: llama.cpp does steps 1 and 2 (``ggml-quants.c``, make_qkx3_quants and make_qx_quants, written anew here); 3 and 4 are coordinate
descent.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..fake_quant.super_reference import SubScales, half, kept_weights, rounded, scales_of_weight, whole_scales
from ..super_blocks import SUPER_BLOCKS, WIDTH, SuperBlock

FACTORS = tuple((50 - step) / 40 for step in range(0, 32, 2))
"""Factors on the range of a sub-block: 1.25 down to 0.5."""
TURNS = 2
"""How often steps 3 and 4 are done."""
_PIECE = 2**18  # weights per piece of work


class SuperScales(NamedTuple):
    """Scales of a weight's super-blocks, as ``fake_quant.Encoded`` has them."""

    scales: Tensor
    """fp32 [out, in / 256]: d."""
    sub: SubScales


class _Blocks(NamedTuple):
    """Super-blocks of some rows."""

    weight: Tensor
    """fp32 [super-blocks, sub-blocks, width]."""
    shares: Tensor
    """h in the shape of ``weight``."""
    form: SuperBlock


class _Found(NamedTuple):
    """Numbers of super-blocks, all fp32 so that they can be moved and compared."""

    scale: Tensor
    """[super-blocks, 1]."""
    minimum: Tensor
    """[super-blocks, 1]; 0 for kinds without minimums."""
    whole: Tensor
    """sc, [super-blocks, sub-blocks]."""
    counts: Tensor
    """m, [super-blocks, sub-blocks]."""


@torch.no_grad()
def searched_super(weight: Tensor, kind: str, mask: Tensor | None = None, importance: Tensor | None = None) -> SuperScales:
    """Find scales for a weight.

    Args:
        weight: [out, in], finite; ``in`` is a multiple of 256.
        kind: q2_k to q6_k.
        mask: bool [out, in], True where a weight is kept (kinds without minimums only); None keeps all.
        importance: h, fp32 [in], not negative; None = 1 for all.
    """
    form = SUPER_BLOCKS[kind]
    kept = kept_weights(weight.detach(), mask)
    rows = max(1, _PIECE // max(1, kept.shape[1]))
    found = [_searched(piece, kind, form, importance) for piece in kept.split(rows)] if kept.numel() else [_nearest(kept, kind)]
    parts = zip(*((scales, *sub) for scales, sub in found))
    scales, whole, minimum, counts = (None if one[0] is None else torch.cat(one) for one in parts)  # pyright: ignore[reportArgumentType]
    assert scales is not None and whole is not None
    return SuperScales(scales, SubScales(whole, minimum, counts))


def _nearest(kept: Tensor, kind: str) -> SuperScales:
    return SuperScales(*scales_of_weight(kept, kind))


def _searched(kept: Tensor, kind: str, form: SuperBlock, importance: Tensor | None) -> SuperScales:
    grouped = kept.view(-1, WIDTH // form.width, form.width)
    shares = torch.ones_like(kept[:1]) if importance is None else importance.to(torch.float32).view(1, -1)
    blocks = _Blocks(grouped, shares.expand_as(kept).reshape(grouped.shape), form)
    start = _of_scales(_nearest(kept, kind), blocks)
    best, least = start, _error(blocks, start).sum(1)
    step, low = _alone(blocks)
    tried = _of_real(step, low, form)
    best, least = _better(best, least, tried, _error(blocks, tried).sum(1))
    for _ in range(TURNS):
        best = _moved(blocks, best)
        least = _error(blocks, best).sum(1)
        tried = _fitted(blocks, best)
        best, least = _better(best, least, tried, _error(blocks, tried).sum(1))
    return _as_stored(best, kept.shape[0], form)


def _of_scales(found: SuperScales, blocks: _Blocks) -> _Found:
    count = blocks.weight.shape[:2]
    scale, sub = found.scales.view(-1, 1), found.sub
    none = torch.zeros_like(scale)
    counts = none.expand(count) if sub.minimums is None else sub.minimums.to(torch.float32).view(count)
    return _Found(scale, none if sub.minimum is None else sub.minimum.view(-1, 1), sub.scales.to(torch.float32).view(count), counts)


def _as_stored(found: _Found, rows: int, form: SuperBlock) -> SuperScales:
    scales, whole = found.scale.view(rows, -1), found.whole.to(torch.int8).view(rows, -1)
    if not form.minimum:
        return SuperScales(scales, SubScales(whole))
    # a super-block without minimums has dmin 0, whatever was tried
    counts = found.counts.to(torch.int8).view(rows, -1)
    return SuperScales(scales, SubScales(whole, found.minimum.view(rows, -1), counts))


def _codes(blocks: _Blocks, step: Tensor, low: Tensor) -> Tensor:
    """Codes fp32 [super-blocks, sub-blocks, width] with S = ``step`` and M = ``low`` per sub-block."""
    return ((blocks.weight + low.unsqueeze(2)) / step.unsqueeze(2)).round_().clamp_(*blocks.form.codes)


def _error(blocks: _Blocks, found: _Found) -> Tensor:
    """Squared error per sub-block [super-blocks, sub-blocks], with the codes that belong to the numbers."""
    step, low = found.scale * found.whole, found.minimum * found.counts
    off = _codes(blocks, step, low).mul_(step.unsqueeze(2)).sub_(low.unsqueeze(2)).sub_(blocks.weight)
    return off.square_().mul_(blocks.shares).sum(2)


def _better(best: _Found, least: Tensor, tried: _Found, error: Tensor) -> tuple[_Found, Tensor]:
    """Per super-block, the numbers with the smaller error; of equal ones, and where the error is NaN, the earlier ones."""
    wins = (error < least).unsqueeze(1)
    return _Found(*(torch.where(wins, new, old) for new, old in zip(tried, best))), torch.minimum(least, error.nan_to_num(torch.inf))


def _alone(blocks: _Blocks) -> tuple[Tensor, Tensor]:
    """Step 1: (s, n) per sub-block, real numbers."""
    weight, form = blocks.weight, blocks.form
    low, high = weight.amin(2), weight.amax(2)
    step, under, least = torch.ones_like(low), torch.zeros_like(low), torch.full_like(low, torch.inf)
    for first, deep in _ranges(low, high, form):
        codes = _codes(blocks, first, deep)
        # the fitted pair for these codes; a fit that fails keeps the pair that made them
        new, below = _least_squares(codes, weight, blocks.shares, form.minimum)
        usable = torch.isfinite(new) & (new != 0) & (new.sign() == first.sign())
        new, below = torch.where(usable, new, first), torch.where(usable, below, deep)
        error = codes.mul_(new.unsqueeze(2)).sub_(below.unsqueeze(2)).sub_(weight).square_().mul_(blocks.shares).sum(2)
        better = error < least
        step, under, least = torch.where(better, new, step), torch.where(better, below, under), torch.where(better, error, least)
    return step, under


def _ranges(low: Tensor, high: Tensor, form: SuperBlock) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (s, n) to begin with, for each factor; sub-blocks of zeros have s = 1."""
    if form.minimum:
        under = -low.clamp(max=0.0)
        whole = (high.clamp(min=0.0) + under) / form.codes[1]
    else:
        under, whole = torch.zeros_like(low), torch.where(high >= -low, high, low) / form.codes[0]
    whole = whole.masked_fill(whole == 0, 1.0)
    for factor in FACTORS:
        yield whole * factor, under * factor


def _least_squares(codes: Tensor, weight: Tensor, shares: Tensor, minimum: bool) -> tuple[Tensor, Tensor]:
    """(s, n) that minimise sum h (s q - n - w)^2 over the last axis; n is at least 0, and 0 without minimums."""
    own = codes * shares
    squares, product = (own * codes).sum(-1), (own * weight).sum(-1)
    plain = product / squares
    if not minimum:
        return plain, torch.zeros_like(plain)
    total, first, target = shares.sum(-1), own.sum(-1), (shares * weight).sum(-1)
    determinant = total * squares - first * first
    step = (total * product - first * target) / determinant
    under = (first * product - squares * target) / determinant
    below = ~(under > 0)
    return torch.where(below, plain, step), torch.where(below, torch.zeros_like(under), under)


def _of_real(step: Tensor, low: Tensor, form: SuperBlock) -> _Found:
    """Step 2: stored numbers from real ones."""
    scale, deepest = half(step.abs().amax(1, keepdim=True) / form.most), low.amax(1, keepdim=True)
    minimum = half(deepest / form.most).masked_fill_(deepest == 0, 0.0)
    counts = (low / minimum).nan_to_num_(0.0).round_().clamp_(0.0, float(form.most))
    return _Found(scale, minimum, whole_scales(step, scale, form.most), counts)


def _moved(blocks: _Blocks, found: _Found) -> _Found:
    """Step 3: sc and m of each sub-block, moved by at most one."""
    best, least, form = found, _error(blocks, found), blocks.form
    for wide in (-1.0, 0.0, 1.0):
        for deep in (-1.0, 0.0, 1.0) if form.minimum else (0.0,):
            if not wide and not deep:
                continue
            # in magnitude: a scale keeps its sign
            magnitude = (found.whole.abs() + wide).clamp_(1.0, float(form.most))
            tried = found._replace(
                whole=torch.where(found.whole < 0, -magnitude, magnitude), counts=(found.counts + deep).clamp(0.0, float(form.most))
            )
            error = _error(blocks, tried)
            wins = error < least
            best = best._replace(whole=torch.where(wins, tried.whole, best.whole), counts=torch.where(wins, tried.counts, best.counts))
            least = torch.where(wins, error, least)
    return best


def _fitted(blocks: _Blocks, found: _Found) -> _Found:
    """Step 4: d and dmin by least squares over the super-block."""
    codes = _codes(blocks, found.scale * found.whole, found.minimum * found.counts)
    # y = d (sc q) - dmin m: linear in d and dmin
    first, second = (codes * found.whole.unsqueeze(2)).flatten(1), -found.counts.unsqueeze(2).expand_as(codes).flatten(1)
    weight, shares = blocks.weight.flatten(1), blocks.shares.flatten(1)
    aa, aw = (shares * first * first).sum(1), (shares * first * weight).sum(1)
    if not blocks.form.minimum:
        return found._replace(scale=half(aw / aa).unsqueeze(1))
    ab, bb, bw = (shares * first * second).sum(1), (shares * second * second).sum(1), (shares * second * weight).sum(1)
    determinant = aa * bb - ab * ab
    scale, minimum = (bb * aw - ab * bw) / determinant, (aa * bw - ab * aw) / determinant
    # what cannot be fitted becomes NaN, and its error never wins
    return found._replace(scale=half(scale).unsqueeze(1), minimum=minimum.clamp(min=0.0).to(torch.float16).to(torch.float32).unsqueeze(1))


def super_error(weight: Tensor, found: SuperScales, kind: str, importance: Tensor | None = None) -> Tensor:
    """fp64 []: the squared error of a weight that is rounded to nearest with these scales."""
    _, _, values = rounded(weight.to(torch.float32).contiguous(), found.scales, found.sub, kind)
    off = (values.view(weight.shape) - weight).double().square_()
    return (off if importance is None else off * importance).sum()
