"""Single verbs on a model folder. Each runs a recipe of one stage, so it resumes, skips and reports like any other run."""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...models.common.errors import UserError

DEFAULT_TOKENS = {"distill": "1M", "qat": "1M"}
"""Training tokens of a verb if neither tokens nor steps are given."""


@dataclass(frozen=True)
class TextChoice:
    """The text that a verb trains or measures on."""

    files: Sequence[str] | None
    hub: str | None
    seq_length: int
    eval_tokens: str | None = None

    def data(self) -> dict[str, Any]:
        """Return the ``data`` section of a recipe."""
        if self.files and self.hub:
            raise UserError("--text and --hub exclude each other; give one of them")
        source: dict[str, Any] = (
            {"files": list(self.files)} if self.files else {"hub": self.hub} if self.hub else {"builtin": "python-stdlib"}
        )
        measured = {"eval_tokens": self.eval_tokens} if self.eval_tokens else {}
        return {**source, "seq_length": self.seq_length, **measured}


def verb_recipe(kind: str, model: str, settings: dict[str, Any], text: TextChoice, teacher: str | None) -> dict[str, Any]:
    """Return the recipe, as plain data, that runs one stage of ``kind`` on ``model``."""
    recipe: dict[str, Any] = {"name": f"{kind}-{_slug(model)}", "student": {"path": model}, "data": text.data()}
    if teacher:
        recipe["teacher"] = {"path": teacher}
    # A step of 32 windows, so that a verb can be tried on a short text.
    recipe["trainer"] = {"global_batch_tokens": text.seq_length * 32}
    recipe["stages"] = [{kind: {k: v for k, v in settings.items() if v is not None}}]
    return recipe


def verb_overrides(kind: str, overrides: Sequence[str]) -> list[str]:
    """Convert KEY=VALUE of a single verb to overrides of its recipe: a key of the stage needs no prefix (``steps=9`` for
    ``stages.0.steps=9``).

    A top-level key of recipes (``teacher.load_in``, ``seed``) keeps its meaning. An unknown key goes where the most similar key is, so that
    the message can name that key.
    """
    from ... import types_of
    from ...configs.foreign_names import meant_by
    from ...configs.problems import nearest_name
    from ...configs.reading import KEYS
    from ...trainer.stages.registry import STAGE_KINDS

    own = set(types_of(STAGE_KINDS[kind].settings)) - set(KEYS)

    def of_the_stage(key: str) -> bool:
        return key in own or (key not in KEYS and meant_by(key) is None and nearest_name(key, [*KEYS, *own]) in own)

    return [f"stages.0.{text}" if of_the_stage(text.partition("=")[0].partition(".")[0].strip()) else text for text in overrides]


def _gives_steps(override: str) -> bool:
    keys = override.partition("=")[0].split(".")
    return keys[0].strip() == "stages" and keys[-1].strip() == "steps"


def _use_of_text(settings: Any) -> str:
    """What a stage does with the training text, as a verb; '' if it reads none."""
    from ...trainer.settings_pruning import PruneSettings
    from ...trainer.stage_plan import reads_text, trains

    if not reads_text(settings):
        return ""
    if trains(settings):
        return "learns from"
    return "scores channels on" if isinstance(settings, PruneSettings) else "calibrates on"


def _slug(model: str) -> str:
    path = Path(model)
    # runs/x/01-distill/model is named by its stage, since all stages call their folder 'model'
    name = path.parent.name if path.name == "model" and path.parent.name else path.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def prune_settings(ffn: int | None, keep: str | None, tokens: str | None) -> dict[str, Any]:
    """Return the settings of the ``prune`` stage for ``--ffn`` or ``--keep``."""
    if (ffn is None) == (keep is None):
        raise UserError("give exactly one of --ffn (channels kept in every layer) and --keep (share of the weights that stays)")
    if ffn is not None and tokens is not None:
        raise UserError("--ffn is one shot and takes no --tokens; run `decoct distill` on the result to recover")
    return {"structured": {"ffn": ffn}} if ffn is not None else {"magnitude": {"keep": keep}, "tokens": tokens}


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
    if kind == "distill" and not teacher:
        raise UserError("decoct distill needs a teacher to learn from: --teacher MODEL (a model folder or a hub id)")
    from ...configs.loader import recipe_from_dict
    from ..run.start import start

    given = verb_overrides(kind, overrides or ())
    if "tokens" in settings and settings["tokens"] is None and kind in DEFAULT_TOKENS and not any(map(_gives_steps, given)):
        settings = {**settings, "tokens": DEFAULT_TOKENS[kind]}
    recipe = recipe_from_dict(verb_recipe(kind, model, settings, text, teacher), given)
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
    # files that somebody names are all meant; of the standard library or a hub dataset a part is enough
    text = replace(text, eval_tokens=text.eval_tokens or ("all" if text.files else "32k"))
    named = [task for given in tasks for task in given.split(",") if task]
    settings = {"max_perplexity_increase": gate, "round_teacher": False, "tasks": named or None}
    run_verb("evaluate", model, settings, text, teacher, overrides, out)


def run_export(model: Path, out: Path, form: str, allow_inexact: bool = False, reader_version: str | None = None) -> None:
    """Pack a model folder, verify the result, and print what was found."""
    from ...models.capabilities import percent
    from ...models.folder.gguf_folder import gguf_file
    from ...models.folder.loading import find_model_folder
    from ...models.folder.model_folder import read_record
    from ...models.folder.stored_names import left_out_words
    from ...models.folder.structure import covered_share
    from ...qat.export.export import export_folder
    from ...qat.runtimes.outcome_words import outcome_text
    from ..terminal.console import CleanConsole

    console = CleanConsole(markup=False, highlight=False, soft_wrap=True)
    if gguf_file(model) is not None:
        model = find_model_folder(model, None, weights=True)
    result = export_folder(model, out, form, allow_inexact=allow_inexact, reader_version=reader_version)
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
    if accept:
        accept_changes(folder, accept)
    with console.status("verifying"):
        report = verify_folder(folder, source=source, runtimes=runtimes)
    for check in report.checks:
        console.print(f"  ok  {check}")
    for name, seen in report.runtimes.items():
        console.print(f"  {name}: {outcome_text(seen)}")
    if report.problems:
        raise UserError(f"{folder} is not what was exported:\n" + "\n".join(f"  - {problem}" for problem in report.problems))
