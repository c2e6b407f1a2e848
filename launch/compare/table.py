"""The comparison as a table for the terminal and as one self-contained HTML page."""

from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from ..report.pictures import render, size_against_quality
from ..report.tables import count, number, served, table_size, task_cell, with_error
from ..terminal.fitting_table import fitting_table

if TYPE_CHECKING:
    from rich.table import Table

_LEFT_OUT_FIRST = ("disk", "parameters", "tokens/s", "top-1", "bits/weight")
_SHORT = {"parameters": "params", "bits/weight": "bits/w", "perplexity": "ppl", "bits/byte": "bpb"}


def headings(comparison: dict[str, Any]) -> tuple[str, ...]:
    """The columns: bits per byte where vocabularies differ, and one for each task."""
    per_byte = ("bits/byte",) if any("bits_per_byte" in row for row in comparison["models"]) else ()
    return (
        "model", "parameters", "size", "disk", "bits/weight", "perplexity", *per_byte, "KL", "top-1", "tokens/s", *_tasks(comparison),
    )  # fmt: skip


def cells(comparison: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows as text, under ``headings``."""
    return [_cells(row, headings(comparison), _tasks(comparison)) for row in comparison["models"]]


def _tasks(comparison: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for row in comparison["models"] for name in row.get("tasks") or {}))


def _cells(row: dict[str, Any], columns: Sequence[str], tasks: Sequence[str]) -> tuple[str, ...]:
    measured = row["eval"]
    known = {
        "model": row["name"],
        "parameters": count(row["parameters"]),
        "size": table_size(served(row, "bytes")),
        "disk": table_size(row["bytes"]),
        "bits/weight": number(served(row, "bits_per_weight"), ".2f"),
        "perplexity": with_error(measured, "perplexity", ".3f"),
        "bits/byte": number(row.get("bits_per_byte"), ".3f"),
        "KL": with_error(measured, "kl", ".4f"),
        "top-1": number(measured["top1"], ".1%"),
        "tokens/s": number(row["tokens_per_second"], ".3g"),
        **{task: task_cell((row.get("tasks") or {}).get(task)) for task in tasks},
    }
    return tuple(known[column] for column in columns)


def terminal_table(comparison: dict[str, Any], width: int) -> "Table":
    """The table for a console of ``width`` characters."""
    return fitting_table(
        None, headings(comparison), cells(comparison), width,
        text=("model",), left_out_first=_LEFT_OUT_FIRST, short=_SHORT, elsewhere="--json and --html have them",
    )  # fmt: skip


def sentences(comparison: dict[str, Any]) -> list[str]:
    """How the figures were taken."""
    p = comparison["protocol"]
    first = comparison["models"][0]["name"]
    return [
        f"Text: {p['text']} (fingerprint {p['text_hash'][:12]}), {p['tokens']:,} tokens in windows of {p['context']}, computed in fp32.",
        f"KL and top-1 agreement are against {first}; ± is one standard error over {p['blocks']:,} blocks of the text.",
        "Size is what the model takes where it is served, disk its weight files; bits per weight are of the size.",
        "Tokens per second are of one text, in fp32 by transformers on this machine, with packed weights unpacked. They compare "
        "the work of models, not of formats in a serving stack.",
    ]


def page(comparison: dict[str, Any]) -> str:
    """The page as HTML text, with the picture as inline SVG and all text escaped."""
    import jinja2
    from markupsafe import Markup

    # the reference is drawn as the teacher is in a report
    rows = [{**row, "kind": "teacher" if at == 0 else "student"} for at, row in enumerate(comparison["models"])]
    svg = render(size_against_quality({"stages": rows, "exports": [], "baselines": []}, connected=False), "svg").decode()
    source = resources.files("decoct.launch.compare").joinpath("page.html.j2").read_text(encoding="utf-8")
    # autoescape, as names of models are free text; StrictUndefined, so that a renamed key fails in a test and not as a hole in a page
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(source).render(
        headings=headings(comparison),
        rows=cells(comparison),
        notes=comparison["notes"],
        sentences=sentences(comparison),
        # without the XML prolog, which is not allowed inside HTML
        picture=Markup(svg[svg.index("<svg") :]),
    )
