"""Chooses the tokens of a teacher's distribution that a cache keeps.

``top_k`` keeps the likeliest tokens, and the mass of all others as one number. ``sampled`` and ``hybrid`` keep the likeliest 1 or ``top``
tokens, and others drawn without replacement with probability min(1, p / tau) and weight max(p, tau), with tau such that the draws exactly
fill the row (threshold sampling, Duffield, Lund & Thorup 2007; systematic draws). Every token's expected weight is its probability, as in
random sampling with replacement (RS-KD, arXiv 2503.16870), with the least variance for this number of tokens.
"""

import torch
from torch import Tensor

from ...losses.sparse import SparseTargets
from .packed_rows import PackedRows, RowFormat, log_code, log_of


def choose_rows(log_p: Tensor, form: RowFormat, start: Tensor) -> PackedRows:
    """Chooses the rows that a cache keeps of ``log_p``.

    Args:
        log_p: [n, V] fp32 log-probabilities at the temperature of ``form``.
        form: Layout of the rows.
        start: [n] in [0, 1): start of the systematic draws.
    """
    # [n, top], by falling probability
    top_logs, top_ids = log_p.topk(form.top, 1)
    entropy = torch.special.entr(log_p.exp()).sum(1)
    if form.tail:
        return _likeliest(log_p, form, entropy)
    # probabilities [n, V] without the top tokens, which are always kept
    rest = log_p.exp().scatter_(1, top_ids, 0.0)
    # up, because a smaller tau would draw more tokens than the row holds; from here on tau is the value that is stored
    floor = log_code(_threshold(rest, form.others).log(), up=True)
    tau = log_of(floor).exp().unsqueeze(1)
    certain = rest >= tau
    # systematic draws: a token is drawn where the running sum of p / tau passes a whole number
    through = rest.masked_fill(certain, 0).div_(tau).cumsum_(1).add_(start.unsqueeze(1)).floor_()
    # through[v] counts the whole numbers passed up to token v; a step of one is a draw, as p / tau < 1 for these tokens
    drawn = through.diff(dim=1, prepend=torch.zeros_like(through[:, :1])) > 0
    # rest > 0, because rounding of the running sum must not draw a token of probability 0
    ids = _places(certain | (drawn & (rest > 0)), form.others)
    used = ids < form.v_eff
    logs = rest.gather(1, ids.masked_fill(~used, 0)).clamp(min=torch.finfo(rest.dtype).tiny).log()
    return PackedRows(top_ids, top_logs, ids, logs, floor, None, entropy)


def _likeliest(log_p: Tensor, form: RowFormat, entropy: Tensor) -> PackedRows:
    """The rows of ``top_k``."""
    logs, ids = log_p.topk(form.top + form.others, 1)
    outside = log_p.scatter(1, ids, -torch.inf).logsumexp(1)
    # tokens of probability 0 take no slot, so that the grid of weights need not reach down to them
    others, order = torch.where(logs > -torch.inf, ids, form.v_eff)[:, form.top :].sort(1)
    kept = logs[:, form.top :].gather(1, order)
    floor = _floor(kept, logs, form)
    return PackedRows(ids[:, : form.top], logs[:, : form.top], others, kept, floor, outside, entropy)


def packed_rows(known: SparseTargets, form: RowFormat) -> PackedRows:
    """Chooses the rows of a top-k cache for a teacher that is itself known in bucket form: the same tokens or fewer."""
    logs, order = known.log_weights.topk(form.top + form.others, 1)
    ids = torch.where(logs > -torch.inf, known.ids.gather(1, order), form.v_eff)
    outside = known.log_weights.scatter(1, order, -torch.inf).logsumexp(1)
    tail = outside if known.log_tail is None else torch.logaddexp(outside, known.log_tail)
    others, by_id = ids[:, form.top :].sort(1)
    kept = logs[:, form.top :].gather(1, by_id)
    return PackedRows(
        ids[:, : form.top].clamp(max=form.v_eff - 1), logs[:, : form.top], others, kept, _floor(kept, logs, form), tail, known.entropy
    )


def _floor(kept: Tensor, logs: Tensor, form: RowFormat) -> Tensor:
    """Code of the smallest log-weight of the others in use, rounded down, so that it is on the grid of weights."""
    least = kept.masked_fill(kept == -torch.inf, torch.inf).amin(1).clamp(max=0) if form.others else logs[:, -1]
    return (log_code(least, up=True) - 1).clamp(min=0)


def _threshold(rest: Tensor, count: int) -> Tensor:
    """tau [n] with sum min(1, rest / tau) = count; the smallest positive number where there is nothing to draw."""
    # no more than ``count`` tokens can be certain, so the largest ``count`` decide tau
    leading = rest.topk(min(count, rest.shape[1]), 1).values
    before = leading.cumsum(1) - leading
    whole = rest.sum(1, keepdim=True)
    # draws left for the others when c = 0, 1, 2, ... of the largest are kept for certain
    number = count - torch.arange(leading.shape[1], device=rest.device)
    candidates = (whole - before).clamp(min=0) / number
    # if c tokens are kept for certain, tau is candidates[c]; the right c is the first whose next token is not above its tau
    fits = leading <= candidates
    first = fits.to(torch.int8).argmax(1, keepdim=True)
    first = torch.where(fits.any(1, keepdim=True), first, leading.shape[1] - 1)
    return candidates.gather(1, first).squeeze(1).clamp(min=torch.finfo(rest.dtype).tiny)


def _places(chosen: Tensor, count: int) -> Tensor:
    """Columns of the first ``count`` true elements per row, ascending: [n, count] int64; unused slots hold the number of columns."""
    # nonzero lists row by row: an element's place in its row is its place in the list minus the row's start
    rows, columns = chosen.nonzero(as_tuple=True)
    starts = torch.zeros(len(chosen) + 1, dtype=torch.int64, device=chosen.device)
    starts[1:] = chosen.sum(1).cumsum(0)
    place = torch.arange(len(rows), device=chosen.device) - starts[rows]
    kept = place < count
    ids = torch.full((len(chosen), count), chosen.shape[1], dtype=torch.int64, device=chosen.device)
    ids[rows[kept], place[kept]] = columns[kept]
    return ids
