"""N:M patterns: of every M consecutive input features of an output row, N weights stay. It imports no torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..common.errors import UserError

MOST = 128
"""Longest group: SparseGPT looks at that many columns at a time. Kernels know 2:4, and some 1:4 and 4:8."""


@dataclass(frozen=True)
class Pattern:
    """``kept`` of each ``group`` consecutive weights of a row stay; the first group begins at input 0."""

    kept: int
    group: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"

    @property
    def share(self) -> float:
        """Share of the weights that stays."""
        return self.kept / self.group

    def check_widths(self, widths: Mapping[str, int]) -> None:
        """Raises UserError if the group does not divide the inputs of a linear.

        Args:
            widths: Number of inputs by the name of the linear.
        """
        uneven = {name: width for name, width in widths.items() if width % self.group}
        for name, width in uneven.items():
            others = f" ({len(uneven)} linears in all)" if len(uneven) > 1 else ""
            fits = [str(group) for group in (2, 3, 4, 5, 7, 8, 16, 32) if all(width % group == 0 for width in widths.values())]
            remedy = f"groups of {', '.join(fits)} divide all inputs; use one of these, or" if fits else "use"
            raise UserError(
                f"pattern {self}: {name} has {width:,} inputs, which groups of {self.group} do not divide{others}; "
                f"{remedy} keep without a pattern"
            )


def parse_pattern(text: str) -> Pattern:
    """The pattern ``n:m``.

    Raises:
        ValueError: it is none, or does not say that some of several weights stay.
    """
    found = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", text)
    if found is None:
        raise ValueError(f"pattern={text!r} must be two whole numbers N:M, such as 2:4 (of each 4 consecutive inputs, 2 weights stay)")
    kept, group = int(found[1]), int(found[2])
    if kept > group >= 1:
        raise ValueError(f"pattern={text!r} keeps {kept} of {group} weights; the first number is what stays: write {group}:{kept}")
    if not 1 <= kept < group <= MOST:
        raise ValueError(f"pattern={text!r} must keep at least 1 and fewer than all of at most {MOST} weights, such as 2:4")
    return Pattern(kept, group)
