"""How the windows of several texts are mixed: which text each position of the order takes its window from.

The shares are whole numbers of windows in a period, and the order of texts repeats with the period. Within it Tijdeman's rule for the
chairman assignment problem (R. Tijdeman 1980, "The chairman assignment problem", Discrete Mathematics 32, section 2) picks the texts: of
the first n positions each text has its share n times c / P, rounded up or down, for every n. So each stretch has the stated shares, and
the text of a position is found without walking to it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property

import numpy as np

MOST_PERIOD = 2**16
"""Longest period; shares that need a longer one are rounded to this denominator."""


@dataclass(frozen=True)
class Blend:
    """Several texts in fixed shares."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """Windows of each text."""
    counts: tuple[int, ...]
    """Windows of each text in a period, at least one."""

    @property
    def period(self) -> int:
        """Windows after which the order of texts repeats."""
        return sum(self.counts)

    @property
    def shares(self) -> list[float]:
        """Share of the windows that each text has."""
        return [count / self.period for count in self.counts]

    @cached_property
    def begins(self) -> np.ndarray:
        """int64 [texts + 1]: index of the first window of each text among the windows of all, and their number."""
        return np.r_[0, np.cumsum(self.sizes)].astype(np.int64)

    def text_of(self, window: int) -> int:
        """The text that a window belongs to."""
        return int(np.searchsorted(self.begins, window, side="right")) - 1

    def places(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Texts of the positions ``first .. first + count - 1``, and how many earlier positions have the same text; int64 [count] each."""
        texts, before = _interleaved(self.counts)
        whole, at = np.divmod(np.arange(first, first + count, dtype=np.int64), self.period)
        chosen = texts[at]
        return chosen, whole * np.array(self.counts, dtype=np.int64)[chosen] + before[at]

    def taken(self, positions: int) -> list[int]:
        """Windows of each text among the first ``positions``."""
        texts, _ = _interleaved(self.counts)
        whole, rest = divmod(positions, self.period)
        part = np.bincount(texts[:rest], minlength=len(self.counts)).tolist()
        return [whole * count + more for count, more in zip(self.counts, part)]

    def epochs(self, positions: int) -> dict[str, float]:
        """How often each text is read by the first ``positions``."""
        return {name: taken / size for name, taken, size in zip(self.names, self.taken(positions), self.sizes)}


def window_counts(of_tokens: Sequence[Fraction], tokens_per_window: Sequence[Fraction]) -> tuple[int, ...]:
    """Windows of each text in a period, for shares of the tokens.

    Args:
        of_tokens: Share of each text; only their proportion matters.
        tokens_per_window: Mean number of tokens of a window of each text: where windows are padded, it differs.
    """
    exact = [share / size for share, size in zip(of_tokens, tokens_per_window)]
    shares = [share / sum(exact) for share in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= MOST_PERIOD:
        return tuple(int(share * period) for share in shares)
    return tuple(largest_remainder(shares, MOST_PERIOD, least=1))


def largest_remainder(shares: Sequence[Fraction], total: int, *, least: int = 0) -> list[int]:
    """Whole numbers that add up to ``total`` in these shares (which add up to 1), by the largest remainders; each at least ``least``."""
    exact = [share * total for share in shares]
    found = [max(least, math.floor(part)) for part in exact]
    # the sort is stable: of equal remainders the first gets one more
    order = sorted(range(len(shares)), key=lambda index: exact[index] - math.floor(exact[index]), reverse=True)
    missing = total - sum(found)
    for index in order[: max(0, missing)]:
        found[index] += 1
    # ``least`` may have given more than there is: the largest gives it back
    found[max(range(len(found)), key=found.__getitem__)] += min(0, missing)
    return found


@cache
def _interleaved(counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The texts of one period, and how often each came before in it; int64 [P] each."""
    period, number = sum(counts), len(counts)
    if number == 1:
        return np.zeros(period, dtype=np.int64), np.arange(period, dtype=np.int64)
    scale = 2 * number - 2
    given = [0] * number
    texts, before = np.empty(period, dtype=np.int64), np.empty(period, dtype=np.int64)
    for at in range(period):
        best, deadline = -1, (0, 1)
        for text, count in enumerate(counts):
            # all numbers times period and scale, so that they are whole
            behind = scale * (count * (at + 1) - period * given[text])
            if behind < period:
                continue
            # the position until which the text can wait, as a fraction
            own = (scale - 1) * period - behind, count
            if best < 0 or own[0] * deadline[1] < deadline[0] * own[1]:
                best, deadline = text, own
        texts[at], before[at] = best, given[best]
        given[best] += 1
    return texts, before
