"""Packs the teacher's distribution at one position into a row of bytes, whose size depends only on the vocabulary and the mode.

A row holds the ``top`` likeliest tokens in order and ``others`` more tokens as a set:

    top ids                 ceil(log2 V) bits each
    their log-weights       12 bits each, linear in nats
    ids of the others       Elias-Fano, ascending; the number V = unused slot
    their weights           4 (top_k) or 7 bits each, see below
    floor, tail             12 bits each, in nats; the tail (mass outside the row) only in top_k
    entropy                 16 bits, as a share of log V

Weights of the others are codes on a linear grid of log-weights between the floor and the smallest of the top. In sampled and hybrid rows
the floor is tau, the weight of every token that was drawn at random. The codes of drawn tokens come first and store the probability
r = p / tau with which the token was drawn: ``DRAWN_LEVELS`` steps of log r from 0 down to -``DRAWN_RANGE``. Weights of tokens kept for
certain, and 1 / r, are rounded up or down at random so that their expectation does not change. So the weights of a row are an unbiased
estimate of the distribution, and sum_S q / r is one of sum q, except for tokens below exp(-16) tau.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...losses.sparse import SparseTargets
from .bits import fold_ascending, fold_bits, from_bytes, to_bytes, unfold_ascending, unfold_bits
from .row_layout import DRAWN_LEVELS, SCALE_BITS, RowLayout

_SCALE = (1 << SCALE_BITS) - 1  # largest 12-bit code
LOG_RANGE = 24.0
"""Range of a 12-bit log-weight in nats below 0; its step is 0.006."""
_ENTROPY = (1 << 16) - 1  # largest 16-bit code
DRAWN_RANGE = 16.0
"""Range of the log-probability of being drawn in nats below 0."""


@dataclass(frozen=True)
class PackedRows:
    """The distributions of n positions before packing."""

    top_ids: Tensor
    """[n, top] int64, by falling probability; the first is the teacher's likeliest."""
    top_logs: Tensor
    """[n, top] fp32 log-probabilities."""
    ids: Tensor
    """[n, others] int64 ascending; ``v_eff`` = unused slot."""
    logs: Tensor
    """[n, others] fp32 log-probabilities."""
    floor: Tensor
    """[n] int64 code (see ``log_code``) of the least of ``logs``; in the sampled form the code of tau, and tokens below it were drawn."""
    log_tail: Tensor | None
    """[n] fp32 log of the mass outside the row; None = sampled form."""
    entropy: Tensor
    """[n] fp32 entropy of the whole distribution."""


def log_code(logs: Tensor, *, up: bool = False) -> Tensor:
    """12-bit code of a log-weight: the nearest one, or with ``up`` the smallest one that is not below it."""
    scaled = (logs / LOG_RANGE + 1).clamp(0, 1) * _SCALE
    return (torch.ceil(scaled) if up else torch.round(scaled)).to(torch.int64)


def log_of(code: Tensor) -> Tensor:
    """fp32 log-weight of a 12-bit code."""
    return (code.to(torch.float32) / _SCALE - 1) * LOG_RANGE


class RowFormat(RowLayout):
    """Layout of a row; encodes and decodes rows."""

    def encode(self, rows: PackedRows, noise: Tensor | None = None) -> Tensor:
        """Packs rows into bytes [n, bytes] uint8.

        Args:
            rows: The rows to pack.
            noise: [n, top + others] in [0, 1), for rounding at random; None = round to nearest.
        """
        top_noise, other_noise = (None, None) if noise is None else (noise[:, : self.top], noise[:, self.top :])
        # on the whole 12-bit grid from -24 to 0 nats
        top = _rounded(rows.top_logs, log_of(torch.tensor(0)), log_of(torch.tensor(_SCALE)), _SCALE, top_noise)
        # the grid of the others ends at the stored weight of the last top token, which the reader knows too
        low, high = log_of(rows.floor), log_of(_above(top[:, -1]))
        low, high = low.unsqueeze(1), high.unsqueeze(1)
        weights = _rounded(rows.logs, low, high, self.levels - 1, other_noise)
        if not self.tail:
            # -log r: rounded at random like a log-weight, it keeps the expectation of 1 / r
            drawn = _rounded(low - rows.logs, torch.zeros_like(low), torch.full_like(low, DRAWN_RANGE), DRAWN_LEVELS - 1, other_noise)
            weights = torch.where(rows.logs < low, drawn, weights + DRAWN_LEVELS)
        # sampled rows have no tail: their weights already stand for all mass
        scales = [rows.floor] if rows.log_tail is None else [rows.floor, log_code(rows.log_tail)]
        entropy = (rows.entropy / math.log(max(self.v_eff, 2))).clamp(0, 1).mul(_ENTROPY).round().to(torch.int64)
        parts = [
            unfold_bits(rows.top_ids, self.id_bits),
            unfold_bits(top, SCALE_BITS),
            unfold_ascending(rows.ids, self.v_eff),
            unfold_bits(weights, self.weight_bits),
            unfold_bits(torch.stack(scales, 1), SCALE_BITS),
            unfold_bits(entropy.unsqueeze(1), 16),
        ]
        # all parts of a row side by side, [n, sum of widths], filled up to whole bytes
        return to_bytes(torch.cat([part for part in parts if part.shape[1]], 1))

    def decode(self, data: Tensor) -> SparseTargets:
        """Unpacks rows of bytes [n, bytes] uint8, on any device, into targets on that device.

        Raises:
            ValueError: the bytes are not rows of this format.
        """
        # the bits beyond the widths fill the last byte
        top_ids, top, ids, weights, scales, entropy = from_bytes(data)[:, : sum(self.widths)].split(self.widths, 1)
        first, top_codes = fold_bits(top_ids, self.id_bits), fold_bits(top, SCALE_BITS)
        others, codes = fold_ascending(ids, self.others, self.v_eff), fold_bits(weights, self.weight_bits)
        levels = fold_bits(scales, SCALE_BITS)
        low, high = log_of(levels[:, :1]), log_of(_above(top_codes[:, -1:]))
        drawn = torch.zeros_like(codes, dtype=torch.bool) if self.tail else codes < DRAWN_LEVELS
        steps = codes if self.tail else (codes - DRAWN_LEVELS).clamp(min=0)
        # the id V marks an unused slot: its bits of a weight mean nothing
        unused = others >= self.v_eff
        # [n, others]; drawn tokens have step 0 and so the weight tau
        logs = (low + (high - low).clamp(min=0) * steps / (self.levels - 1)).masked_fill(unused, -torch.inf)
        # the top tokens are always certain
        certain = torch.cat([torch.ones_like(first, dtype=torch.bool), ~drawn], 1)
        log_weights = torch.cat([log_of(top_codes), logs], 1)
        tail, inclusion = None, None
        if self.tail:
            # code 0 means no tail at all
            tail = torch.where(levels[:, 1] > 0, log_of(levels[:, 1]), -torch.inf)
            # rounded weights need not sum to 1; the bucket form compares distributions, the sampled form an unbiased estimate
            whole = torch.logaddexp(log_weights.logsumexp(1), tail)
            log_weights, tail = log_weights - whole.unsqueeze(1), tail - whole
        else:
            inclusion = torch.cat([torch.zeros_like(log_of(top_codes)), drawn * codes * (-DRAWN_RANGE / (DRAWN_LEVELS - 1))], 1)
        return SparseTargets(
            torch.cat([first, others.masked_fill(unused, 0)], 1),
            log_weights,
            fold_bits(entropy, 16).squeeze(1).to(torch.float32) * (math.log(max(self.v_eff, 2)) / _ENTROPY),
            first[:, 0],
            tail,
            self.temperature,
            # mass known exactly, for the metric covered_mass
            log_weights.masked_fill(~certain, -torch.inf).exp().sum(1).clamp(max=1),
            inclusion,
        )


def _above(code: Tensor) -> Tensor:
    """The next code, because the last top weight may have been rounded down below the others."""
    return (code + 1).clamp(max=_SCALE)


def _rounded(logs: Tensor, low: Tensor, high: Tensor, most: int, noise: Tensor | None) -> Tensor:
    """Codes 0 .. ``most`` of log-weights on a grid from ``low`` to ``high``; with ``noise`` the expected weight equals the weight."""
    # never 0: floor and last top weight may have the same code
    width = (high - low).clamp(min=1e-6)
    place = ((logs - low) / width).clamp(0, 1) * most
    if noise is None:
        return place.round().to(torch.int64)
    below = place.floor().clamp(max=most - 1)
    step = width / most
    lower = low + below * step
    # the expectation of weights is kept, not of logarithms: for w between a and a e^step, P(up) = (w / a - 1) / (e^step - 1)
    share = torch.expm1(logs.clamp(min=low, max=high) - lower) / torch.expm1(step)
    return (below + (noise < share)).to(torch.int64)
