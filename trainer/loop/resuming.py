"""Where a stage starts again: the newest checkpoint that verifies, the same on all ranks; and the best one, which it may end with."""

from collections.abc import Callable
from pathlib import Path

from ...models.common.errors import UserError
from ..checkpoints.read import Checkpoint, fault_of, find_newest_verified, open_checkpoint, prepare_folder, set_aside
from ..plan import TrainingPlan
from ..processes.world import World, value_of_first
from .standing import Standing

Say = Callable[[str], None]


def open_checkpoints(folder: Path, plan: TrainingPlan, world: World, stage: str, say: Say) -> Checkpoint | None:
    """The checkpoint to continue from, the same on all ranks; damaged checkpoints are set aside and reported."""
    chosen = -1
    # rank 0 chooses for all: verifying reads every byte, and ranks that chose for themselves could differ
    if world.is_first:
        prepare_folder(folder)
        found, damaged = find_newest_verified(folder)
        for path, reason in damaged:
            aside = set_aside(path)
            say(f"{stage}: checkpoint {path.name} is damaged ({reason}); it is set aside as {aside.name}")
        if found is not None:
            chosen = found.state.step
        elif damaged:
            say(f"{stage}: all checkpoints are damaged; training starts again from the stage's input")
    # a collective on every rank, also where nothing was found
    step = value_of_first(chosen)
    if step < 0:
        return None
    try:
        # rank 0 has hashed every byte; the others only open it, which shows whether they see the same folder
        found = open_checkpoint(folder, step)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"rank {world.rank} cannot read the checkpoint of step {step} in {folder} ({error}); all ranks need the same run folder"
        ) from None
    _check_same_plan(found, plan, folder)
    say(f"{stage}: continues from the checkpoint of step {step} of {plan.total_steps}")
    return found


def best_checkpoint(folder: Path, plan: TrainingPlan, standing: Standing | None, world: World, stage: str, say: Say) -> Checkpoint | None:
    """The checkpoint whose weights the stage ends with in place of the last ones, the same on all ranks; None = the last ones."""
    if plan.result != "best" or standing is None or standing.best_step == standing.last_step:
        return None
    fault = fault_of(folder, standing.best_step) if world.is_first else ""
    if value_of_first(bool(fault)):
        say(
            f"{stage}: the checkpoint of the best step {standing.best_step} is damaged ({fault}); the model is made of the last weights. "
            "Delete the stage's folder and run again to train it anew."
        )
        return None
    return open_checkpoint(folder, standing.best_step)


def _check_same_plan(found: Checkpoint, plan: TrainingPlan, folder: Path) -> None:
    wanted = plan.identity()
    different = [name for name in sorted(wanted.keys() | found.state.plan.keys()) if wanted.get(name) != found.state.plan.get(name)]
    if different:
        changes = ", ".join(f"{name} {found.state.plan.get(name)!r} -> {wanted.get(name)!r}" for name in different)
        raise UserError(
            f"{folder} holds checkpoints of another training plan ({changes}); continuing would mix the two. "
            "Use the old settings, another run folder, or remove these checkpoints."
        )
