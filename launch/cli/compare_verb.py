"""The verb `compare`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.common.errors import UserError
from ..terminal.console import CleanConsole
from ..terminal.written import QuietEndConsole, write_json
from .stage_recipes import TextChoice

if TYPE_CHECKING:
    from ...trainer.data.prepared_data import PreparedData
    from ...trainer.settings import EvaluateSettings
    from ..answers.opened import Opened


def run_compare(models: Sequence[str], text: TextChoice, tasks: Sequence[str], *, as_json: bool, page: Path | None) -> None:
    """Measure the models and print the table, or JSON; with ``page`` also write HTML."""
    from ...configs.loader import recipe_from_dict
    from ..compare import table
    from ..compare.measuring import compare_models
    from ..report.tables import WIDE
    from ..run.start import quiet_libraries

    # before the first model is measured, which may take long
    if page is not None and (page.is_dir() or not page.parent.is_dir()):
        raise UserError(f"--html={page} is no file that can be written; name a file in a folder that exists")
    # files that somebody names are all meant; of any other text a part is enough
    text = replace(text, eval_tokens=text.eval_tokens or ("all" if text.files else "32k"))
    named = [task for given in tasks for task in given.split(",") if task]
    # a recipe checks all of it, with its messages
    recipe = recipe_from_dict(
        {
            "name": "compare",
            "student": {"path": models[0]},
            "data": text.data(),
            "stages": [{"evaluate": {"tasks": named} if named else {}}],
        }
    )
    quiet_libraries()
    settings: Any = recipe.stages[0].settings
    score = _scoring(settings) if named else None
    console = CleanConsole(stderr=True, markup=False, highlight=False)
    with console.status("") as status:
        found = compare_models(models, recipe.data, score=score, say=status.update)
    if page is not None:
        from ...models.common.files import write_text_atomic

        write_text_atomic(page, table.page(found))
    if as_json:
        write_json(found)
        return
    out = QuietEndConsole(markup=False, highlight=False)
    # a pipe has no width: nothing is left out there
    if not out.is_terminal:
        out.width = max(out.width, WIDE)
    out.print(table.terminal_table(found, out.width))
    for note in found["notes"]:
        out.print(f"- {note}", soft_wrap=True)
    if page is not None:
        out.print(f"wrote {page}", soft_wrap=True)


def _scoring(settings: "EvaluateSettings") -> Any:
    """Scores a model on the tasks of ``settings``, every one of which is opened before the first model."""
    from ...trainer.tasks.scoring import check_choice, score_model
    from ..run.task_scores import choice_of

    choice = choice_of(settings)
    # a task that is not there is told before anything is measured
    check_choice(choice)

    def score(opened: "Opened", data: "PreparedData") -> dict[str, dict[str, Any]]:
        return {name: one.row() for name, one in score_model(opened.model, opened.tokenizer, choice, windows=data.evaluation).items()}

    return score
