"""The plan of `decoct run`: prints the short form, and refuses a recipe that cannot work before any work."""

from typing import TYPE_CHECKING, Any

from ...models.common.errors import UserError
from .make_plan import plan as make_plan
from .problems import problems
from .show import short_form
from .stage_shapes import ImpossibleStageError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console


def check_before_run(recipe: Any, out: "Path", console: "Console", *, nodes: int = 1) -> None:
    """Print the short form; UserError (exit code 2) if something cannot work.

    A model whose config cannot be read is left to the run, which needs more of it and reports more about it.
    """
    try:
        made = make_plan(recipe, nodes=nodes)
    # its message already names the stage and the remedy, and no later check knows more
    except ImpossibleStageError:
        raise
    except UserError:
        return
    # first, because the short form has the numbers behind a refusal
    console.print(short_form(made), markup=False, highlight=False, soft_wrap=True)
    if found := problems(made, out):
        raise UserError("this recipe cannot work here:\n" + "\n".join(f"  - {problem}" for problem in found))
