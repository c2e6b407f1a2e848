"""One table for the terminal, Markdown, HTML and W&B: the rows of a report as text cells."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = ("step", "parameters", "size", "bits/weight", "sparsity", "perplexity", "KL", "p99 KL", "top-1", "tokens", "time")
WIDE = 150
"""Characters that the whole table needs."""
_LEFT_OUT_WHEN_NARROW = {"p99 KL", "tokens", "time"}
_SHORT = {"parameters": "params", "bits/weight": "bits/w", "sparsity": "zeros", "perplexity": "ppl"}


def report_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Text cells under ``HEADINGS``: teacher and stages that made a model, the re-read exports, then what is there for scale."""
    # After an export, `evaluate` judges the re-read files, which have a row of their own.
    twice = "evaluate" if report["exports"] else None
    rows = [_cells(row["name"], row) for row in report["stages"] if row["eval"] and row["kind"] != twice]
    rows += [_cells(f"{row['format']} (re-read)", row) for row in report["exports"]]
    rows += [_cells(f"{row['name']} (for scale)", row) for row in report["baselines"]]
    return rows


def _cells(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    measured = row.get("eval") or {}
    return (
        name,
        count(row.get("parameters")),
        size(row.get("bytes")),
        _number(row.get("bits_per_weight"), ".2f"),
        _number(row.get("sparsity"), ".1%"),
        _number(measured.get("perplexity"), ".3f"),
        _number(measured.get("kl"), ".4f"),
        _number(measured.get("kl_p99"), ".3f"),
        _number(measured.get("top1"), ".1%"),
        count(row.get("tokens")),
        duration(row.get("seconds")),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def count(value: int | None) -> str:
    """1234567 -> '1.23M'; None or 0 -> '-'."""
    if not value:
        return "-"
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return str(value)


def size(value: int | None) -> str:
    """Bytes as decimal kB, MB or GB."""
    if value is None:
        return "-"
    for unit, letters in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if value >= unit:
            return f"{value / unit:.2f} {letters}"
    return f"{value} B"


def duration(seconds: float | None) -> str:
    """Seconds as '42 s', '3 min 05 s' or '2 h 10 min'."""
    if not seconds:
        return "-"
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def markdown_table(report: dict[str, Any]) -> str:
    """The table in Markdown, numbers to the right."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in report_rows(report)])


def terminal_table(report: dict[str, Any], width: int) -> "Table":
    """The table for a console of ``width`` characters; a narrow one gets the columns that matter most."""
    from rich import box
    from rich.table import Table

    shown = [i for i, heading in enumerate(HEADINGS) if width >= WIDE or heading not in _LEFT_OUT_WHEN_NARROW]
    table = Table(
        title=report["name"], title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for index in shown:
        heading = HEADINGS[index] if width >= WIDE else _SHORT.get(HEADINGS[index], HEADINGS[index])
        table.add_column(heading, justify="right" if index else "left", no_wrap=index > 0)
    for row in report_rows(report):
        table.add_row(*(row[index] for index in shown))
    return table
