"""The rows of a report as text cells, for the table in the terminal, Markdown, HTML and W&B."""

from typing import TYPE_CHECKING, Any

from ...trainer.evaluation.spread import EVAL_FIGURES, is_clear
from ..terminal.fitting_table import fitting_table

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = (
    "step", "parameters", "size", "folder", "bits/weight", "sparsity", "perplexity", "change", "KL", "p99 KL", "top-1", "tokens", "time",
)  # fmt: skip
WIDE = 210
"""Width of the whole table in characters, with stage names of usual length."""
LEFT_OUT_FIRST = ("p99 KL", "folder", "tokens", "sparsity", "time", "parameters", "change", "top-1", "bits/weight")
"""Columns in the order in which a narrow terminal drops them; the others are always shown."""
_SHORT = {"parameters": "params", "bits/weight": "bits/w", "sparsity": "zeros", "perplexity": "ppl"}


def headings(report: dict[str, Any]) -> tuple[str, ...]:
    """``HEADINGS`` and the tasks that models were scored on."""
    return (*HEADINGS, *task_names(report))


def task_names(report: dict[str, Any]) -> list[str]:
    """Tasks of which any row has a score, in the order of the rows."""
    rows = (*report["stages"], *report["exports"], *report["baselines"])
    return list(dict.fromkeys(name for row in rows for name in row.get("tasks") or {}))


def report_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return text cells under ``headings``: the teacher and the stages that made a model, the re-read exports, then rows for comparison."""
    tasks = task_names(report)
    return [(*_cells(name, row), *(task_cell((row.get("tasks") or {}).get(task)) for task in tasks)) for name, row in _shown(report)]


def _shown(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    # After an export, `evaluate` judges the re-read files, which have a row of their own.
    twice = "evaluate" if report["exports"] else None
    rows = [(row["name"], row) for row in report["stages"] if row["eval"] and row["kind"] != twice]
    rows += [(f"{row['format']} (re-read)", row) for row in report["exports"]]
    return rows + [(f"{row['name']} (for scale)", row) for row in report["baselines"]]


NUMBERS = (
    "step", "kind", "parameters", "size_bytes", "folder_bytes", "bits_per_weight", "sparsity", "perplexity", "perplexity_se",
    "perplexity_change", "perplexity_change_se", "kl", "kl_se", "kl_p99", "top1", "top1_se", "ece", "tokens", "seconds",
)  # fmt: skip


def report_numbers(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of ``report_rows`` as numbers under ``NUMBERS`` and two columns for each task, None if missing: for trackers, which
    draw and compare them."""
    tasks = task_names(report)
    return [_numbers(name, row) | _task_numbers(row.get("tasks") or {}, tasks) for name, row in _shown(report)]


def _task_numbers(scores: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
    """``task_<name>`` and ``task_<name>_se``."""
    known = [(task, scores.get(task) or {}) for task in tasks]
    return {f"task_{task}{end}": score.get(key) for task, score in known for end, key in (("", "score"), ("_se", "stderr"))}


def _numbers(name: str, row: dict[str, Any]) -> dict[str, Any]:
    measured, plain = row.get("eval") or {}, ("parameters", "sparsity", "tokens", "seconds")
    return {
        **dict.fromkeys(NUMBERS),
        **{key: row.get(key) for key in plain},
        **{key: measured.get(key) for key in EVAL_FIGURES},
        "step": name,
        "kind": row.get("kind", "export"),
        "size_bytes": served(row, "bytes"),
        "folder_bytes": row.get("bytes"),
        "bits_per_weight": served(row, "bits_per_weight"),
        "perplexity_change": (row.get("change") or {}).get("perplexity"),
        "perplexity_change_se": (row.get("change") or {}).get("perplexity_se"),
    }


def _cells(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    measured = row.get("eval") or {}
    return (
        name,
        count(row.get("parameters")),
        table_size(served(row, "bytes")),
        table_size(row.get("bytes")),
        number(served(row, "bits_per_weight"), ".2f"),
        number(row.get("sparsity"), ".1%"),
        with_error(measured, "perplexity", ".3f"),
        _change(row.get("change") or {}),
        with_error(measured, "kl", ".4f"),
        number(measured.get("kl_p99"), ".3f"),
        number(measured.get("top1"), ".1%"),
        count(row.get("tokens")),
        duration(row.get("seconds")),
    )


def served(row: dict[str, Any], figure: str) -> Any:
    """Return ``bytes`` or ``bits_per_weight`` of the model as served; a quantized folder, whose weights are fp32, counts as packed."""
    packed = row.get(f"packed_{figure}")
    return row.get(figure) if packed is None else packed


def number(value: float | None, form: str) -> str:
    """A figure as text; '-' where there is none."""
    return "-" if value is None else format(value, form)


def with_error(measured: dict[str, Any], name: str, form: str) -> str:
    """A figure and its standard error: '10.000 ±0.210'."""
    error = measured.get(f"{name}_se")
    return number(measured.get(name), form) + ("" if error is None else f" ±{error:{form}}")


def task_cell(score: dict[str, Any] | None) -> str:
    """A score and its standard error: shares as '45.2% ±1.1%', other metrics as numbers."""
    if score is None:
        return "-"
    # the range alone makes no share: a loss may lie in it too, but is better when lower
    form = ".1%" if score["higher_is_better"] and 0 <= score["score"] <= 1 else ".3f"
    return with_error({"score": score["score"], "score_se": score["stderr"]}, "score", form)


def _change(change: dict[str, Any]) -> str:
    """The change of the perplexity with its standard error; 'none seen' where chance explains it."""
    value, error = change.get("perplexity"), change.get("perplexity_se")
    # without an error nobody can say what chance explains
    if value is None or error is None:
        return number(value, "+.2%")
    return f"{value:+.2%} ±{error:.2%}" if is_clear(value, error) else f"none seen ±{error:.2%}"


def count(value: int | None) -> str:
    """Format a count: 1234567 -> '1.23M'; None or 0 -> '-'."""
    if not value:
        return "-"
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return str(value)


def table_size(value: int | None) -> str:
    """Format bytes as decimal kB, MB or GB."""
    if value is None:
        return "-"
    for unit, letters in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if value >= unit:
            return f"{value / unit:.2f} {letters}"
    return f"{value} B"


def duration(seconds: float | None) -> str:
    """Format seconds as '42 s', '3 min 05 s' or '2 h 10 min'."""
    if not seconds:
        return "-"
    # half a second is shown as one, since '0 s' reads like nothing was done
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def report_markdown(report: dict[str, Any]) -> str:
    """Return the table in Markdown, with numbers aligned to the right."""
    names = headings(report)
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in report_rows(report)])


def terminal_table(report: dict[str, Any], width: int) -> "Table":
    """Return the table for a console of ``width`` characters; a narrow table drops the least important columns and names them."""
    return fitting_table(
        report["name"],
        headings(report),
        report_rows(report),
        width,
        text=HEADINGS[:1],
        # the last ones to go, the last task first
        left_out_first=(*LEFT_OUT_FIRST, *reversed(task_names(report))),
        short=_SHORT,
        elsewhere="report.md has them",
    )
