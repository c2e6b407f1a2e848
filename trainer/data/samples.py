"""Counts of conversations: read, left out with the reasons, and changed."""

from collections import Counter
from dataclasses import dataclass, field

from ...models.common.errors import UserError
from ...models.common.terminal_text import printable_line
from .conversations import SHAPES

MOST_BAD = 0.1
"""Largest share of bad rows; with more of them all data is refused."""
# bounds on a summary of faults: every broken row may have a reason of its own
_MOST_REASONS = 20
_MOST_CHARACTERS = 300


@dataclass
class Samples:
    """Counts of rows read and rows left out because they are invalid, with the reasons, and of changes to the other rows."""

    read: int = 0
    bad: int = 0
    first_bad: str = ""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rows that were left out, by reason."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was cut, replaced or not learned in the other rows."""

    most_reasons: int | None = _MOST_REASONS
    """Reasons that are named; further ones are counted as "other reasons". None = all are named."""

    def refuse(self, where: str, why: str) -> None:
        """Counts a bad row."""
        # the reason may quote the row, which is foreign text: escaped, so that it cannot control the terminal
        why = printable_line(why)[:_MOST_CHARACTERS]
        self.bad += 1
        self.first_bad = self.first_bad or f"{where}: {why}"
        self._count(why, 1)

    def _count(self, why: str, rows: int) -> None:
        named = why in self.reasons or self.most_reasons is None or len(self.reasons) < self.most_reasons
        self.reasons[why if named else "other reasons"] += rows

    def add(self, later: "Samples") -> None:
        """Adds the counts of the rows behind these, in which all reasons are named."""
        self.read += later.read
        self.bad += later.bad
        self.first_bad = self.first_bad or later.first_bad
        for why, rows in later.reasons.items():
            self._count(why, rows)
        self.notes.update(later.notes)

    def check(self) -> None:
        """Raises UserError if too many rows are bad, or none is good."""
        # a few bad rows are normal in collected data; a large share means a misread format, and training on the rest would hide it
        if self.bad > MOST_BAD * self.read or self.bad == self.read:
            often = "; ".join(f"{count:,} x {why}" for why, count in self.reasons.most_common(3))
            raise UserError(
                f"data: {self.bad:,} of {self.read:,} conversations cannot be used; the first: {self.first_bad}. In all: {often}. "
                f"Rows need {', '.join(SHAPES[:-1])} or {SHAPES[-1]}"
            )
