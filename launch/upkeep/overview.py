"""The state of run folders at a glance, from their files alone; nothing heavy is imported and nothing is changed."""

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...models.common.errors import UserError
from ...models.common.locks import is_held
from ...trainer.loop.metrics import read_row
from ..run.outcome import read_run_outcome
from ..run.run_folder import LOCK, RunFolder

if TYPE_CHECKING:
    from ...configs.recipe import Recipe, StageEntry

State = Literal["running", "finished", "stopped at a gate", "failed", "interrupted", "stopped", "damaged"]
RECIPE = "recipe.yaml"
_TAIL_BYTES = 65_536


@dataclass(frozen=True, kw_only=True)
class RunState:
    """One run folder."""

    path: Path
    recipe: str
    """Name of the recipe."""
    state: State
    """stopped = neither running nor finished, and it did not say why: killed, or the machine went down."""
    message: str
    """What went wrong; '' if nothing did, or nobody knows."""
    stage: str
    """The stage that runs or is next; the last one of a finished run."""
    stages_done: int
    stages: int
    step: int | None
    """Optimizer steps of that stage so far; None where it takes none."""
    steps: int | None
    perplexity: float | None
    """The last figures on held-out text: of the stage while it trains, else of the last model."""
    kl: float | None
    changed: float
    """Time of the last change (seconds since 1970)."""


def find_runs(folder: Path) -> list[Path]:
    """The run folders in ``folder``, which may be one itself.

    Raises:
        UserError: there is no such folder, or no run in it.
    """
    if (folder / RECIPE).is_file():
        return [folder]
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name the folder that holds the run folders: decoct runs FOLDER")
    found = sorted(path.parent for path in folder.glob(f"*/{RECIPE}"))
    if not found:
        raise UserError(f"{folder} holds no run folders (folders with {RECIPE}); `decoct run RECIPE` makes one in runs/")
    return found


def state_of(path: Path) -> RunState:
    """Look at one run folder. A damaged one is reported as that, not raised."""
    changed = _changed(path)
    try:
        recipe = _recipe(path)
        done = [entry for entry in recipe.stages if _done(path, entry)]
    except UserError as error:
        return RunState(
            path=path, recipe=path.name, state="damaged", message=str(error).splitlines()[0], stage="", stages_done=0, stages=0, step=None,
            steps=None, perplexity=None, kl=None, changed=changed,
        )  # fmt: skip
    report = _report(path, recipe)
    state, message = _ended(path, report)
    working = [entry for entry in recipe.stages if entry.kind != "evaluate"]
    left = next((entry for entry in working if entry not in done), None)
    at = left or (recipe.stages[-1] if recipe.stages else None)
    line = _last_line(path, at.name) if at else None
    step, steps = (line["step"] if line else None), (_steps(recipe, at) if at else None)
    measured = _figures(path, report, done) if state != "running" or line is None else {}
    ppl, kl = (measured.get(name) for name in ("perplexity", "kl"))
    if left and (seen := _last_line(path, left.name, "held_out_perplexity")):
        ppl, kl = seen["held_out_perplexity"], seen.get("held_out_kl")
    return RunState(
        path=path, recipe=recipe.name, state=state, message=message, stage=at.name if at else "",
        stages_done=len(recipe.stages) if report else len(done), stages=len(recipe.stages), step=step, steps=steps, perplexity=ppl, kl=kl,
        changed=changed,
    )  # fmt: skip


def _recipe(path: Path) -> "Recipe":
    from ...configs.loader import outline_of

    return outline_of(path / RECIPE)


def _done(path: Path, entry: "StageEntry") -> bool:
    return RunFolder(path).stage(entry.name).read().get("state") == "done"


def _ended(path: Path, report: dict[str, Any] | None) -> tuple[State, str]:
    # the kernel knows who holds the lock; files would say "running" of a process that was killed
    if is_held(path / LOCK):
        return "running", ""
    if report is not None:
        gates = report.get("gates") or []
        return ("stopped at a gate", "; ".join(map(str, gates))) if gates else ("finished", "")
    told = read_run_outcome(path)
    if told is None:
        return "stopped", ""
    return ("interrupted", "") if told[0] == "interrupted" else ("failed", told[1])


def _report(path: Path, recipe: "Recipe") -> dict[str, Any] | None:
    """The report of the run as it is now; None if it is absent or of an earlier start that a later one has overtaken."""
    file = path / "report.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        # an older report is that of a start before the last one
        newer = any((path / name).stat().st_mtime > file.stat().st_mtime for name in (RECIPE, "outcome.json") if (path / name).exists())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and not newer else None


def _figures(path: Path, report: dict[str, Any] | None, done: "list[StageEntry]") -> dict[str, Any]:
    """Figures of the last model that was measured."""
    if report is not None:
        rows = [row for row in (*report.get("stages", []), *report.get("exports", [])) if isinstance(row, dict) and row.get("eval")]
        return rows[-1]["eval"] if rows else {}
    for entry in reversed(done):
        # the newest first; a damaged record is passed over
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            return dict(json.loads((path / entry.name / "measured.json").read_text(encoding="utf-8"))["row"]["eval"])
    return {}


def _steps(recipe: "Recipe", entry: "StageEntry") -> int | None:
    from ...trainer.stage_plan import derive_steps, trains

    if not trains(entry.settings):
        return None
    with suppress(UserError):
        # for one rank: the number of steps is the same for any
        return derive_steps(
            entry.settings, recipe.trainer, name=entry.name, seq_length=recipe.data.seq_length, ranks=1, seed=recipe.seed
        ).total_steps
    return None


def _last_line(path: Path, stage: str, having: str = "") -> dict[str, Any] | None:
    """The last line of metrics.jsonl about a stage, that has the figure ``having``; only the end of the file is read."""
    file = path / "metrics.jsonl"
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - _TAIL_BYTES))
            # it may begin inside a line, whose rest is no row and is skipped
            lines = stream.read().decode(errors="replace").split("\n")
    except OSError:
        return None
    for text in reversed(lines):
        row = read_row(text)
        if row and row["stage"] == stage and (not having or row.get(having) is not None):
            return row
    return None


def _changed(path: Path) -> float:
    # a folder with none of these files is the oldest
    times = [0.0]
    for pattern in (RECIPE, "metrics.jsonl", "report.json", "outcome.json", "*/stage.json"):
        for file in path.glob(pattern):
            # a run may replace a file at this moment
            with suppress(OSError):
                times.append(file.stat().st_mtime)
    return max(times)


def age(seconds: float) -> str:
    """How long ago, in the largest unit that fits: '5 s', '3 min', '2 h', '4 days'."""
    for unit, word in ((86_400, "day"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            number = int(seconds // unit)
            return f"{number} {word}{'s' * (word == 'day' and number != 1)}"
    return f"{max(0, int(seconds))} s"


def as_json(run: RunState) -> dict[str, Any]:
    """A run as plain data."""
    changed = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run.changed))
    return {**{name: getattr(run, name) for name in run.__dataclass_fields__}, "path": str(run.path), "changed": changed}
