"""The verb `runs`."""

import time
from pathlib import Path

from ..terminal.fitting_table import fitting_table
from ..terminal.written import QuietEndConsole, write_json
from ..upkeep.overview import RunState, age, as_json, find_runs, state_of

_HEADINGS = ("run", "recipe", "state", "stage", "progress", "perplexity", "KL", "changed")
_LEFT_OUT_FIRST = ("KL", "recipe", "changed", "perplexity")


def run_runs(folder: Path, json_wanted: bool) -> None:
    """Print a line for each run folder, the latest last."""
    # the latest last: it stands next to the shell's prompt
    runs = sorted((state_of(path) for path in find_runs(folder)), key=lambda run: run.changed)
    if json_wanted:
        write_json([as_json(run) for run in runs])
        return
    console = QuietEndConsole(markup=False, highlight=False)
    now = time.time()
    rows = [_cells(run, now) for run in runs]
    text = ("run", "recipe", "state", "stage")
    console.print(
        fitting_table(None, _HEADINGS, rows, console.width, text=text, left_out_first=_LEFT_OUT_FIRST, short={"perplexity": "ppl"})
    )
    for run in runs:
        if run.message:
            console.print(f"{run.path}: {run.message}", soft_wrap=True)


def _cells(run: RunState, now: float) -> list[str]:
    done = f"{run.stages_done}/{run.stages}" if run.stages else "-"
    steps = (
        ""
        if run.state == "finished" or run.step is None or not run.steps
        else f" step {run.step:,}/{run.steps:,} ({run.step / run.steps:.0%})"
    )
    return [
        str(run.path),
        run.recipe,
        run.state,
        run.stage or "-",
        f"{done}{steps}",
        "-" if run.perplexity is None else f"{run.perplexity:.3f}",
        "-" if run.kl is None else f"{run.kl:.4f}",
        f"{age(now - run.changed)} ago",
    ]
