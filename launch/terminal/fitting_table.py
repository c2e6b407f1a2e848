"""Tables for a console of any width: text wraps, numbers are never cut, and columns that do not fit are dropped with a note."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_WIDEST_WORD = 24
"""Largest minimum width of a text column in characters; longer words are folded."""


def fitting_table(
    title: str | None,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int,
    *,
    text: Sequence[str],
    left_out_first: Sequence[str] = (),
    short: Mapping[str, str] | None = None,
    elsewhere: str = "",
) -> "Table":
    """Return a table that is at most ``width`` characters wide, if possible.

    Args:
        headings: Headings of the columns.
        rows: Cells as plain text, one per heading.
        text: Headings of text columns, which are left-aligned and wrap; the others hold numbers.
        left_out_first: Headings in the order in which a narrow table drops them; the others are always shown.
        short: Short forms of headings, used if the whole table does not fit.
        elsewhere: Where to find the dropped columns, such as 'report.md has them'.
    """
    shown = list(headings)
    table = _table(title, headings, rows, shown, text, {})
    # first the whole table, then with short headings, then one column less each time
    for left_out in (None, *left_out_first):
        if _fits(table, width):
            break
        shown = [heading for heading in shown if heading != left_out]
        table = _table(title, headings, rows, shown, text, short or {})
    if missing := [heading for heading in headings if heading not in shown]:
        table.caption = "; ".join(filter(None, [f"columns left out to fit the width: {', '.join(missing)}", elsewhere]))
        table.caption_justify = "left"
    return table


def _table(
    title: str | None,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    shown: Sequence[str],
    text: Sequence[str],
    short: Mapping[str, str],
) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=None if title is None else Text(title),
        title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    places = [list(headings).index(heading) for heading in shown]
    for place, heading in zip(places, shown):
        name = short.get(heading, heading)
        if heading in text:
            words = [word for row in rows for word in (*row[place].split(), *name.split())]
            # wraps at spaces; a longer word is folded rather than cut
            table.add_column(name, min_width=min(max(map(len, words), default=1), _WIDEST_WORD), overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        # as Text: names of stages and paths may contain rich's markup
        table.add_row(*(Text(row[place]) for place in places))
    return table


def _fits(table: "Table", width: int) -> bool:
    """Return whether nothing is cut. (rich's own measure ignores the padding.)"""
    widths = [column.min_width or max(map(len, (str(column.header), *map(str, column.cells)))) for column in table.columns]
    # two spaces between columns
    return sum(widths) + 2 * len(widths) <= width
