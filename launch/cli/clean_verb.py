"""The verb `clean`: show what can go and how much it is, ask, remove."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ...models.common.cache_folder import cache_folder
from ...models.common.errors import UserError
from ...models.common.locks import Lock, acquire_or_refuse
from ..report.tables import table_size
from ..run.run_folder import LOCK
from ..terminal.fitting_table import fitting_table
from ..terminal.written import QuietEndConsole
from ..upkeep.leftovers import cache_leftovers, remove, run_leftovers
from ..upkeep.overview import RECIPE


def run_clean(runs: Sequence[Path], *, cache: bool, yes: bool, dry_run: bool) -> None:
    """Clean run folders, and with ``cache`` the shared cache. A run that is going is left alone (UserError)."""
    if not runs and not cache:
        raise UserError("name a run folder, such as runs/quickstart (`decoct runs` lists them), or give --cache")
    console = QuietEndConsole(markup=False, highlight=False)
    with ExitStack() as held:
        # locked until everything is removed: a run that starts meanwhile is refused
        for run in runs:
            # what is no run folder is refused below, and gets no lock file before
            if (run / RECIPE).is_file():
                lock = Lock(run / LOCK)
                acquire_or_refuse(lock, f"the run folder {run}", console.print)
                held.enter_context(lock)
        found = [one for run in runs for one in run_leftovers(run)] + (cache_leftovers() if cache else [])
        if not found:
            places = [*map(str, runs), *([str(cache_folder())] if cache else [])]
            console.print(f"nothing to remove in {', '.join(places)}", soft_wrap=True)
            return
        rows = [[str(one.path), table_size(one.bytes), one.why] for one in found]
        console.print(fitting_table(None, ("folder", "size", "why it can go"), rows, console.width, text=("folder", "why it can go")))
        total = sum(one.bytes for one in found)
        console.print(f"{len(found)} folder{'s' * (len(found) > 1)}, {table_size(total)}", soft_wrap=True)
        if dry_run or not (yes or agreed("remove them?", "--yes removes them without asking")):
            console.print("nothing was removed")
            return
        console.print(f"freed {table_size(remove(found))}")


def agreed(question: str, instead: str) -> bool:
    """Ask someone at the terminal; UserError where nobody can answer."""
    import typer

    if not sys.stdin.isatty():
        raise UserError(f"this needs an answer, and there is no terminal to ask; {instead}")
    try:
        return typer.confirm(question)
    # Ctrl-C or Ctrl-D at the question is a no
    except typer.Abort:
        return False
