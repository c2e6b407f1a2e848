"""Writes report.{json,md,html} from the stages' records: what each step cost. Nothing is computed again here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...models.common.files import write_json_atomic, write_text_atomic
from ...qat.runtimes.outcome_words import outcome_text
from .bit_widths import width_tables
from .curves import read_curves
from .page import render_page
from .searches import search_markdown
from .sentences import exactness, protocol_lines, stage_sentences
from .tables import report_markdown

Report = dict[str, Any]


def build_report(
    *,
    name: str,
    versions: dict[str, Any],
    protocol: dict[str, Any],
    recipe: dict[str, Any],
    stages: list[dict[str, Any]],
    baselines: list[dict[str, Any]],
    exports: list[dict[str, Any]],
    gates: Sequence[str] = (),
    notes: Sequence[str] = (),
    samples: dict[str, Any] | None = None,
) -> Report:
    """Return the report as plain data.

    Args:
        stages: rows ``{name, kind, path, parameters, bytes, bits_per_weight, sparsity, tokens, seconds, eval, change}``, the teacher first,
            then the model that the first stage works on; ``packed_bytes`` and ``packed_bits_per_weight`` are as an export packs it, and
            ``change`` is against the row before, as ``launch.run.changes`` has it.
        baselines: rows of the same form for comparison (the teacher, only rounded).
        exports: rows ``{format, path, bytes, exact, tokens_per_second, peak_bytes, runtimes, ...}``, measured on the re-read files; one
            that is not exact also has ``rounding`` (as ``qat.source.plain_source.CastError``).
        gates: a sentence for each failed gate, where the run ended.
        notes: important notes for readers, a sentence each.
        samples: what models say to a few prompts, as ``launch.run.samples`` has it.
    """
    assert stages, "a report has at least the row of the model it started from"
    return {
        "name": name,
        "version": versions["packages"]["decoct"],
        "commit": versions["commit"],
        "versions": versions,
        "protocol": protocol,
        "stages": _without_blocks(stages),
        "baselines": _without_blocks(baselines),
        "exports": _without_blocks(exports),
        "gates": list(gates),
        "notes": list(notes),
        "samples": samples,
        "recipe": recipe,
    }


def _without_blocks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without the sums over blocks, of which errors and changes are made already; they stay in the stages' measured.json."""
    return [{key: value for key, value in row.items() if key != "blocks"} for row in rows]


def write_report(report: Report, run_dir: Path) -> list[Path]:
    """Write report.json, report.md and the self-contained report.html into ``run_dir`` and return their paths."""
    # curves are read from the file, not from memory: after a resume it also has the lines of earlier starts
    curves = read_curves(run_dir / "metrics.jsonl")
    targets = [run_dir / f"report.{suffix}" for suffix in ("json", "md", "html")]
    # the data first: should a picture fail to draw, the figures are safe
    write_json_atomic(targets[0], report)
    write_text_atomic(targets[1], markdown_report(report))
    write_text_atomic(targets[2], render_page(report, curves))
    return targets


def markdown_report(report: Report) -> str:
    """Return the table, the checks of the exports and the protocol as Markdown."""
    lines = [f"# {report['name']}", "", report_markdown(report), ""]
    lines += [f"- The run ended at a gate: {sentence}." for sentence in report.get("gates", [])]
    told = stage_sentences(report)
    lines += [f"- {sentence}." for sentence in told]
    for name, kinds in width_tables(report):
        lines += ["", f"| {name}: kind | bits of layer 0, 1, ... |", "|---|---|", *(f"| {kind} | {bits} |" for kind, bits in kinds), ""]
    lines += search_markdown(report)
    lines += [line for note in report["notes"] for line in (f"> **Note:** {note}.", "")]
    for export in report["exports"]:
        lines.append(f"- `{export['format']}` in `{export['path']}`: {exactness(export)}.")
        for runtime, seen in export["runtimes"].items():
            lines.append(f"  - {runtime}: {outcome_text(seen)}")
    return "\n".join([*lines, "", *(f"{line}  " for line in protocol_lines(report)), ""])
