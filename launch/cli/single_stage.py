"""Single verbs on a model folder. Each runs a recipe of one stage, so it resumes, skips and reports like any other run."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...models.common.errors import UserError
from .stage_recipes import TextChoice, evaluation, export_model, read_verb


def _use_of_text(settings: Any) -> str:
    """What a stage does with the training text, as a verb; '' if it reads none."""
    from ...trainer.settings_pruning import PruneSettings
    from ...trainer.stage_plan import reads_text, trains

    if not reads_text(settings):
        return ""
    if trains(settings):
        return "learns from"
    return "scores channels on" if isinstance(settings, PruneSettings) and settings.structured else "calibrates on"


def run_verb(
    kind: str,
    model: str,
    settings: dict[str, Any],
    text: TextChoice,
    teacher: str | None,
    overrides: Sequence[str] | None,
    out: Path | None,
) -> None:
    """Run one stage on a model folder."""
    from ..run.start import start
    from ..terminal.imported_code import tell_imported

    recipe = read_verb(kind, model, settings, text, teacher, overrides or (), tell_imported)
    use = _use_of_text(recipe.stages[0].settings)
    # judged by the recipe, because an override may name a text, a method or a number of tokens too; one message for all ranks
    if recipe.data.builtin and use and os.environ.get("RANK", "0") == "0":
        print(f"decoct: neither --text nor --hub: {kind} {use} the Python standard library, which is for trying out", file=sys.stderr)
    start(recipe, out)


def run_evaluate(
    model: str,
    text: TextChoice,
    teacher: str | None,
    gate: str | None,
    overrides: Sequence[str] | None,
    out: Path | None,
    tasks: Sequence[str] = (),
) -> None:
    """Measure a model folder or an export on all of the given files; the gate decides the exit code."""
    text, settings = evaluation(text, gate, tasks)
    run_verb("evaluate", model, settings, text, teacher, overrides, out)


def run_export(model: Path, out: Path, form: str, allow_inexact: bool = False, reader_version: str | None = None) -> None:
    """Pack a model folder, verify the result, and print what was found."""
    from ...models.capabilities import percent
    from ...models.folder.model_folder import read_record
    from ...models.folder.stored_names import left_out_words
    from ...models.folder.structure import covered_share
    from ...qat.runtimes.outcome_words import outcome_text
    from ..terminal.console import CleanConsole

    console = CleanConsole(markup=False, highlight=False, soft_wrap=True)
    result = export_model(model, out, form, allow_inexact, reader_version)
    kind = "rounded weight" if result.rounding else "weight"
    console.print(f"wrote {out}: {form}, {result.bytes:,} bytes, every {kind} rebuilt exactly by an independent reader")
    record = read_record(out)
    if modules := record.get("quant", {}).get("modules"):
        console.print(f"  packs {percent(covered_share(out, modules))} of the decoder's weights")
    if left_out := record.get("left_out"):
        console.print(f"  {left_out_words(left_out)}")
    if result.rounding:
        console.print(f"  NOT exact: {result.rounding} (--allow-inexact)")
    for name, seen in result.runtimes.items():
        console.print(f"  {name}: {outcome_text(seen)}")


def run_plain(model: str, out: Path, revision: str | None) -> None:
    """Make a plain text model, and print what it was made from."""
    from ...models.folder.plain_copy import make_plain
    from ..terminal.console import CleanConsole

    what = make_plain(model, out, revision=revision)
    CleanConsole(markup=False, highlight=False, soft_wrap=True).print(f"wrote {out}: {what}")


def run_import(source: str, out: Path, adapter: Path | None, dtype: str | None, tokenizer: str | None, revision: str | None) -> None:
    """Make a plain model folder of another form, and say where its weights come from."""
    from ...models.folder.import_model import import_model
    from ..terminal.console import CleanConsole

    console = CleanConsole(markup=False, highlight=False, soft_wrap=True)
    with console.status("importing"):
        what = import_model(source, out, adapter=adapter, dtype=dtype, tokenizer=tokenizer, revision=revision)
    console.print(f"wrote {out}: {what}")


def run_verify(folder: Path, source: Path | None, runtimes: bool, accept: Sequence[str] = ()) -> None:
    """Print every check of an export; UserError (exit code 2) if one fails. Changes of the files in ``accept`` are first recorded."""
    from ...models.folder.record import accept_changes
    from ...qat.runtimes.outcome_words import outcome_text
    from ...qat.verify.verify import verify_folder
    from ..terminal.console import CleanConsole

    console = CleanConsole(markup=False, highlight=False, soft_wrap=True)
    # first, since the checks compare files with the record
    if accept:
        accept_changes(folder, accept)
    with console.status("verifying"):
        report = verify_folder(folder, source=source, runtimes=runtimes)
    for check in report.checks:
        console.print(f"  ok  {check}")
    for name, seen in report.runtimes.items():
        console.print(f"  {name}: {outcome_text(seen)}")
    if report.problems:
        raise UserError(f"{folder} is not what was written:\n" + "\n".join(f"  - {problem}" for problem in report.problems))
