"""What a cache keeps of a teacher at one position, in a row of bytes whose size depends on the vocabulary and the mode alone.

A row holds the ``top`` likeliest tokens by themselves and ``others`` more tokens as a set:

    top ids                 ceil(log2 V) bits each
    their log-weights       12 bits each, linear in nats
    ids of the others       Elias-Fano, ascending; the number V = slot not in use
    their weights           4 (top_k) or 7 bits each, see below
    floor, tail             12 bits each, in nats; the tail (mass outside the row) in top_k only
    entropy                 16 bits, as a share of log V

Weights of the others are codes on a linear grid of log-weights between the floor and the smallest of the top. In sampled and hybrid rows
the floor is tau, the weight of every token that was drawn at random; their codes come first, and tell the probability r = p / tau with
which it was drawn: ``DRAWN_LEVELS`` steps of log r from 0 down to -``DRAWN_RANGE``. Weights of tokens kept for certain, and 1 / r, are
rounded up or down at random such that their expectation is what they were: the weights of a row are an unbiased estimate of the
distribution, and sum_S q / r one of sum q, but for tokens below exp(-16) tau.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...losses.sparse import SparseTargets
from .bits import ascending_width, fold, fold_ascending, from_bytes, to_bytes, unfold, unfold_ascending

SCALE_BITS = 12
_SCALE = (1 << SCALE_BITS) - 1
LOG_RANGE = 24.0
"""Nats below 0 that a 12-bit log-weight reaches; its step is 0.006."""
_ENTROPY = (1 << 16) - 1
DRAWN_LEVELS = 80
"""Codes of a token that was drawn; the other 48 are for tokens kept for certain. A step is 0.2 nats."""
DRAWN_RANGE = 16.0
"""Nats below 0 that the probability of being drawn reaches."""


@dataclass(frozen=True)
class PackedRows:
    """What is to be kept of n positions."""

    top_ids: Tensor
    """[n, top] int64, by falling probability; the first is the teacher's likeliest."""
    top_logs: Tensor
    """[n, top] fp32 log-probabilities."""
    ids: Tensor
    """[n, others] int64 ascending; ``v_eff`` = not in use."""
    logs: Tensor
    """[n, others] fp32 log-probabilities."""
    floor: Tensor
    """[n] int64 code (see ``log_code``) of the least of ``logs``, or in the sampled form of tau: what is below was drawn at random."""
    log_tail: Tensor | None
    """[n] fp32 log of the mass outside the row; None = sampled form."""
    entropy: Tensor
    """[n] fp32 entropy of the whole distribution."""


def log_code(logs: Tensor, *, up: bool = False) -> Tensor:
    """12-bit code of a log-weight: the nearest, or the next one that is not smaller."""
    scaled = (logs / LOG_RANGE + 1).clamp(0, 1) * _SCALE
    return (torch.ceil(scaled) if up else torch.round(scaled)).to(torch.int64)


def log_of(code: Tensor) -> Tensor:
    """fp32 log-weight of a 12-bit code."""
    return (code.to(torch.float32) / _SCALE - 1) * LOG_RANGE


@dataclass(frozen=True)
class RowFormat:
    """Sizes of a row, and the way between rows and bytes."""

    v_eff: int
    top: int
    others: int
    tail: bool
    """Whether a row knows its tail (bucket form) or is a sample."""
    temperature: float

    @property
    def id_bits(self) -> int:
        """Bits of a token id."""
        return max(1, (self.v_eff - 1).bit_length())

    @property
    def weight_bits(self) -> int:
        """Bits of the log-weight of one of the others."""
        return 4 if self.tail else 7

    @property
    def levels(self) -> int:
        """Steps of the log-weight of one of the others."""
        return (1 << self.weight_bits) - (0 if self.tail else DRAWN_LEVELS)

    @property
    def widths(self) -> list[int]:
        """Bits of each part, in order."""
        scales = SCALE_BITS * (2 if self.tail else 1)
        ids = ascending_width(self.others, self.v_eff)
        return [self.top * self.id_bits, self.top * SCALE_BITS, ids, self.others * self.weight_bits, scales, 16]

    @property
    def bytes(self) -> int:
        """Bytes of a row."""
        return -(-sum(self.widths) // 8)

    def encode(self, rows: PackedRows, noise: Tensor | None = None) -> Tensor:
        """[n, bytes] uint8.

        Args:
            rows: What to keep.
            noise: [n, top + others] in [0, 1), for rounding at random; None = to nearest.
        """
        top_noise, other_noise = (None, None) if noise is None else (noise[:, : self.top], noise[:, self.top :])
        top = _rounded(rows.top_logs, log_of(torch.tensor(0)), log_of(torch.tensor(_SCALE)), _SCALE, top_noise)
        low, high = log_of(rows.floor), log_of(_above(top[:, -1]))
        low, high = low.unsqueeze(1), high.unsqueeze(1)
        weights = _rounded(rows.logs, low, high, self.levels - 1, other_noise)
        if not self.tail:
            drawn = _rounded(low - rows.logs, torch.zeros_like(low), torch.full_like(low, DRAWN_RANGE), DRAWN_LEVELS - 1, other_noise)
            weights = torch.where(rows.logs < low, drawn, weights + DRAWN_LEVELS)
        scales = [rows.floor] if rows.log_tail is None else [rows.floor, log_code(rows.log_tail)]
        entropy = (rows.entropy / math.log(max(self.v_eff, 2))).clamp(0, 1).mul(_ENTROPY).round().to(torch.int64)
        parts = [
            unfold(rows.top_ids, self.id_bits),
            unfold(top, SCALE_BITS),
            unfold_ascending(rows.ids, self.v_eff),
            unfold(weights, self.weight_bits),
            unfold(torch.stack(scales, 1), SCALE_BITS),
            unfold(entropy.unsqueeze(1), 16),
        ]
        return to_bytes(torch.cat([part for part in parts if part.shape[1]], 1))

    def decode(self, data: Tensor) -> SparseTargets:
        """Rows of bytes [n, bytes] uint8, on any device, as targets on that device.

        Raises:
            ValueError: these are not such rows.
        """
        top_ids, top, ids, weights, scales, entropy = from_bytes(data)[:, : sum(self.widths)].split(self.widths, 1)
        first, top_codes = fold(top_ids, self.id_bits), fold(top, SCALE_BITS)
        others, codes = fold_ascending(ids, self.others, self.v_eff), fold(weights, self.weight_bits)
        levels = fold(scales, SCALE_BITS)
        low, high = log_of(levels[:, :1]), log_of(_above(top_codes[:, -1:]))
        drawn = torch.zeros_like(codes, dtype=torch.bool) if self.tail else codes < DRAWN_LEVELS
        steps = codes if self.tail else (codes - DRAWN_LEVELS).clamp(min=0)
        unused = others >= self.v_eff
        logs = (low + (high - low).clamp(min=0) * steps / (self.levels - 1)).masked_fill(unused, -torch.inf)
        certain = torch.cat([torch.ones_like(first, dtype=torch.bool), ~drawn], 1)
        log_weights = torch.cat([log_of(top_codes), logs], 1)
        tail, inclusion = None, None
        if self.tail:
            tail = torch.where(levels[:, 1] > 0, log_of(levels[:, 1]), -torch.inf)
            whole = torch.logaddexp(log_weights.logsumexp(1), tail)
            log_weights, tail = log_weights - whole.unsqueeze(1), tail - whole
        else:
            inclusion = torch.cat([torch.zeros_like(log_of(top_codes)), drawn * codes * (-DRAWN_RANGE / (DRAWN_LEVELS - 1))], 1)
        return SparseTargets(
            torch.cat([first, others.masked_fill(unused, 0)], 1),
            log_weights,
            fold(entropy, 16).squeeze(1).to(torch.float32) * (math.log(max(self.v_eff, 2)) / _ENTROPY),
            first[:, 0],
            tail,
            self.temperature,
            log_weights.masked_fill(~certain, -torch.inf).exp().sum(1).clamp(max=1),
            inclusion,
        )


def _above(code: Tensor) -> Tensor:
    """The next code: the top's own may have been rounded down below the others."""
    return (code + 1).clamp(max=_SCALE)


def _rounded(logs: Tensor, low: Tensor, high: Tensor, most: int, noise: Tensor | None) -> Tensor:
    """Codes 0 .. ``most`` of log-weights on a grid from ``low`` to ``high``; with ``noise`` the expected weight is the weight itself."""
    width = (high - low).clamp(min=1e-6)
    place = ((logs - low) / width).clamp(0, 1) * most
    if noise is None:
        return place.round().to(torch.int64)
    below = place.floor().clamp(max=most - 1)
    step = width / most
    lower = low + below * step
    # weights, not logarithms: with w between a and a e^step, P(up) = (w / a - 1) / (e^step - 1)
    share = torch.expm1(logs.clamp(min=low, max=high) - lower) / torch.expm1(step)
    return (below + (noise < share)).to(torch.int64)
