"""Layout of a row of packed soft targets: the widths of its parts. It imports no torch, because plans count a cache's bytes."""

from dataclasses import dataclass

from ...models.settings import CACHED_BYTES, MOST_TOKENS, MOST_TOP_K, CacheSettings, LoadIn, StoredStates

SCALE_BITS = 12
DRAWN_LEVELS = 80
"""Number of codes for drawn tokens, in steps of 0.2 nats; the other 48 of the 7 bits are for tokens kept for certain."""


@dataclass(frozen=True)
class RowLayout:
    """Layout of a row of packed soft targets (``packed_rows`` says what its parts are)."""

    v_eff: int
    top: int
    others: int
    tail: bool
    """True: rows store their tail (bucket form). False: rows are samples."""
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
        """Number of codes for the log-weight of a token that was kept for certain."""
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


GROUP = 64
"""Channels of a state in int8 that share a scale."""


@dataclass(frozen=True)
class HiddenLayout:
    """Layout of a row that holds a hidden state (``hidden_rows`` says how)."""

    v_eff: int
    hidden: int
    states: StoredStates
    temperature: float = 1.0
    """Of no effect: states are those of every temperature."""

    @property
    def bytes(self) -> int:
        """Bytes of a row."""
        if self.states == "int8":
            return self.hidden + 2 * -(-self.hidden // GROUP)
        return self.hidden * (4 if self.states == "fp32" else 2)

    def exact(self, load_in: LoadIn) -> bool:
        """Whether states of a teacher that is loaded like this are stored as they are."""
        return self.states == "fp32" or (self.states == "bf16" and load_in != "fp32")


def cache_layout(settings: CacheSettings, v_eff: int, hidden: int, temperature: float) -> RowLayout | HiddenLayout:
    """Layout of a cache's rows, of either kind; ``hidden`` is the teacher's hidden size."""
    if settings.mode == "hidden":
        return HiddenLayout(v_eff, hidden, settings.states or "bf16")
    return row_layout(settings, v_eff, temperature)


def row_layout(settings: CacheSettings, v_eff: int, temperature: float) -> RowLayout:
    """Layout of a cache's rows. Without ``settings.tokens`` a row holds as many tokens as fit into ``CACHED_BYTES``.

    The mode must be one that keeps tokens.
    """

    def form(tokens: int) -> RowLayout:
        # top_k: four exact ranks, the rest as a set of ascending ids, which takes fewer bits
        top = {"top_k": min(4, tokens), "sampled": 1, "hybrid": max(1, tokens // 4)}[settings.mode]
        return RowLayout(v_eff, top, tokens - top, settings.mode == "top_k", temperature)

    if settings.tokens is not None:
        return form(min(settings.tokens, v_eff))
    most = min(MOST_TOP_K if settings.mode == "top_k" else MOST_TOKENS, v_eff)
    # bytes grow with tokens: the first that fits is the most that fits
    fitting = (tokens for tokens in range(most, 2, -1) if form(tokens).bytes <= CACHED_BYTES[settings.mode])
    return form(next(fitting, min(2, v_eff)))


def low_width(count: int, limit: int) -> int:
    """Number of bits per number that are stored directly, for ``count`` ascending numbers in [0, limit]."""
    return max(0, ((limit + 1) // max(count, 1)).bit_length() - 1)


def ascending_width(count: int, limit: int) -> int:
    """Total bits of ``count`` ascending numbers in [0, limit]."""
    low = low_width(count, limit)
    return count * low + count + (limit >> low) if count else 0
