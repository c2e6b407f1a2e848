"""report.{json,md,html}: what each step cost, from what the stages wrote down. Nothing is computed anew here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...models.capabilities import percent
from ...models.files import write_json_atomic, write_text_atomic
from ...qat.export.plain_source import Rounding
from ...qat.runtime_words import outcome_text
from .curves import read_curves
from .page import render_page
from .tables import markdown_table

Report = dict[str, Any]
Row = dict[str, Any]


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
) -> Report:
    """The report as plain data.

    Args:
        stages: rows ``{name, kind, path, parameters, bytes, bits_per_weight, sparsity, tokens, seconds, eval, change}``, the teacher first,
            then the model that the first stage works on; ``packed_bytes`` and ``packed_bits_per_weight`` are as an export packs it, and
            ``change`` is against the row before, as ``launch.run.changes`` has it.
        baselines: rows of the same form for scale (the teacher merely rounded).
        exports: rows ``{format, path, bytes, exact, tokens_per_second, peak_bytes, runtimes, ...}``, measured on the re-read files; one
            that is not exact also has ``rounding`` (as ``qat.export.plain_source.Rounding``).
        gates: sentences about gates that were not met; the run ended there.
        notes: what a reader should not miss, a sentence each.
    """
    assert stages, "a report has at least the row of the model it started from"
    return {
        "name": name,
        "version": versions["packages"]["decoct"],
        "commit": versions["commit"],
        "versions": versions,
        "protocol": protocol,
        "stages": stages,
        "baselines": baselines,
        "exports": exports,
        "gates": list(gates),
        "notes": list(notes),
        "recipe": recipe,
    }


def write_report(report: Report, run_dir: Path) -> list[Path]:
    """Write report.json, report.md and the self-contained report.html into ``run_dir`` and return their paths."""
    curves = read_curves(run_dir / "metrics.jsonl")
    targets = [run_dir / f"report.{suffix}" for suffix in ("json", "md", "html")]
    write_json_atomic(targets[0], report)
    write_text_atomic(targets[1], markdown_report(report))
    write_text_atomic(targets[2], render_page(report, curves))
    return targets


def protocol_lines(report: Report) -> list[str]:
    """How the figures were taken, one sentence a line."""
    p, v = report["protocol"], report["versions"]
    packages = ", ".join(f"{n} {v['packages'][n]}" for n in ("decoct", "torch", "transformers", "lightning") if v["packages"].get(n))
    return [
        f"Held-out text: {p['text']} (fingerprint {p['text_hash'][:12]}), {p['tokens']:,} tokens "
        f"in non-overlapping windows of {p['context']}, computed in {p['dtype']}.",
        *_left_out(p.get("left_out", {})),
        "KL is the mean over tokens of KL(teacher || model) in nats; top-1 is how often both predict the same token.",
        "Size is what the model takes where it is served, folder its weight files on disk. After qat or quantize the two differ: the "
        "folder holds codes times scales in fp32, and an export packs codes and scales and keeps the rest in 16 bits (embeddings, head "
        "and norms, as a rule, which weigh heavily in small models).",
        "Bits per weight = 8 x size / parameters, embeddings included, tied tensors once; sparsity is the share of zeros in linear "
        "weights without embeddings and head.",
        "Change is of the perplexity, against the row before: a stage against the model it began with, a re-read export against the model "
        "it was made of.",
        f"Commit {report['commit'] or 'of an installed package'}; {packages}; Python {v['python']}; "
        f"{', '.join(v['gpus']) or v['cpu']}, {v['cores']} cores.",
    ]


def _left_out(counts: dict[str, int]) -> list[str]:
    """What of the text was not used, by reason; nothing to say where all was."""
    listed = "; ".join(f"{count:,} {reason}" for reason, count in counts.items())
    return [f"Not used of the text: {listed}."] if listed else []


def markdown_report(report: Report) -> str:
    """The table, the exports' checks and the protocol as Markdown."""
    lines = [f"# {report['name']}", "", markdown_table(report), ""]
    lines += [f"- The run ended at a gate: {sentence}." for sentence in report.get("gates", [])]
    lines += [f"- {sentence}." for sentence in coverage_sentences(report)]
    lines += [line for note in report["notes"] for line in (f"> **Note:** {note}.", "")]
    for export in report["exports"]:
        lines.append(f"- `{export['format']}` in `{export['path']}`: {exactness(export)}.")
        for runtime, seen in export["runtimes"].items():
            lines.append(f"  - {runtime}: {outcome_text(seen)}")
    return "\n".join([*lines, "", *(f"{line}  " for line in protocol_lines(report)), ""])


def coverage_sentences(report: Report) -> list[str]:
    """What share of the decoder's weights each stage worked on, where it says so."""
    told = ((row, row["coverage"]) for row in report["stages"] if row.get("coverage"))
    return [
        f"{row['name']} worked on {percent(seen['share'])} of the decoder's weights"
        + (f"; left as they are: {', '.join(seen['left'])}" if seen["left"] else "")
        for row, seen in told
    ]


def exactness(export: Row) -> str:
    """What a row of ``exports`` says of the weights in its files."""
    if export["exact"]:
        return "rebuilt element by element by an independent reader"
    rounding = export.get("rounding")
    return f"NOT exact: {Rounding(**rounding)}" if rounding else "NOT exact"
