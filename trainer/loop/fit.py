"""fit() trains one stage to its last step on Lightning's Trainer, from the start or from the newest checkpoint.

Resuming does not use Lightning's own loop state. Each start builds a loader of exactly the micro-batches that are left; the learning rate
is a function of the step; student, optimizer, hooks and random generators are restored from the newest checkpoint that verifies.
"""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from ...models.common.errors import MemoryFullError, NonFiniteError
from ...models.common.memory_errors import asked_for, out_of_memory
from ..checkpoints.read import Checkpoint
from ..data.order import blend_of
from ..data.windows import WindowSource
from ..plan import TrainingPlan as TrainingPlan
from ..processes.sharding import ParameterViews
from ..processes.strategy import shards
from ..processes.world import World, connect, current_world
from ..progress import Progress, make_progress, print_line
from .callback import LoopCallback, StageLoop
from .checkpoint_tensors import restore
from .held_out import HeldOut
from .hooks import StepHook
from .lightning_trainer import determinism, lightning_trainer, loader, quiet
from .metrics import MetricsSink
from .module import Objectivelike, TrainingModule
from .optimizer import build_optimizer
from .placed_student import Placed
from .resuming import Say, best_checkpoint, open_checkpoints
from .samples import Samples
from .saving_callback import SavingCallback
from .signals import StopSignals
from .standing import best_words, facts, standing_from

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from ...models.folder.weights import WeightFiles


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """Result of a stage's training over all its starts."""

    student: "PreTrainedModel"
    """The trained student on the CPU, in eval mode: the given object, or under FSDP2 a gathered copy (only on rank 0)."""
    steps: int
    """Optimizer steps that were taken: those of the plan, or fewer after an early end."""
    tokens: int
    """Input tokens trained on."""
    seconds: float
    """Training time."""
    resumed_from: int | None
    """Step from which this start continued; None if it began at the first step."""
    metrics: Mapping[str, float | int | None]
    """Numbers of the last step; empty if no step was left."""
    held_out: Mapping[str, Any] | None = None
    """What the evaluations during the stage say (``standing.facts``); None without one that counts."""


def fit(
    student: "PreTrainedModel",
    objective: Objectivelike,
    windows: WindowSource,
    plan: TrainingPlan,
    *,
    work: Path,
    stage: str,
    metrics: MetricsSink,
    hooks: Sequence[StepHook] = (),
    callbacks: Sequence[pl.Callback] = (),
    weights: "WeightFiles | None" = None,
    console: "Console | None" = None,
    progress: Progress | None = None,
    held_out: HeldOut | None = None,
    samples: Samples | None = None,
) -> FitResult:
    """Trains ``student`` on all ranks. Continues from ``work/checkpoints``, and returns at once if the last step is done.

    Args:
        student: Model with fp32 weights, whole on every rank or, with ``weights``, on the meta device. Do not use it afterwards: use the
            result's student.
        objective: Computes the loss sums of a micro-batch; see ``Objective``.
        windows: Training windows.
        plan: All numbers of the stage.
        work: The stage's folder; checkpoints go into ``work/checkpoints``.
        stage: Name in metrics and messages.
        metrics: Receives the numbers of each step.
        hooks: Called around each step, in this order.
        callbacks: Lightning callbacks, called after the loop's own, and before a checkpoint is written.
        weights: Files with the values of a student on the meta device; each rank reads only what it holds.
        console: Console of rank 0 for messages and progress; None = silent.
        progress: Progress display to use instead of the console's own.
        held_out: Evaluates the student before the first step and at intervals; it changes no number of the training.
        samples: Replaces windows by text that the student or the teacher writes; not with a sharded student.

    Raises:
        NonFiniteError: loss or gradient norm is NaN or infinite; weights and checkpoints are as before that step.
        MemoryFullError: memory ran out while training; the checkpoints are complete.
        UserError: the checkpoints belong to another plan, or the last one could not be written.
        KeyboardInterrupt, SystemExit(143): stopped by Ctrl-C or SIGTERM, after a checkpoint.
    """
    world = current_world()
    connect(world)
    shown = console if world.is_first else None
    # only rank 0 prints: every rank makes the same progress, and messages of the others would repeat it
    say: Say = (lambda text: None) if shown is None else partial(print_line, shown)
    folder = work / "checkpoints"
    # before metrics, loaders and models: everything below starts at the step that is found here
    found = open_checkpoints(folder, plan, world, stage, say)
    start = found.state.step if found else 0
    # lines of steps after the checkpoint, which are taken again
    metrics.rewind(stage, start)
    # before any loader or trainer is built: a finished stage is only restored
    standing = standing_from(found.state.standing) if found else None
    ended = standing is not None and standing.ended
    if found is not None and (start == plan.total_steps or ended):
        say(f"{stage}: {f'it ended early, after {start} steps' if ended else f'all {start} steps are done'}")
        best = best_checkpoint(folder, plan, standing, world, stage, say)
        result = _finished(found, best or found, Placed(student, weights, plan, world), plan, hooks, world)
        return _told(result, stage, say)
    placed = Placed(student, weights, plan, world)
    loop = StageLoop(
        stage=stage,
        plan=plan,
        folder=folder,
        world=world,
        metrics=metrics,
        progress=progress or make_progress(shown),
        say=say,
        held_out=held_out,
        windows=len(windows),
        blend=blend_of(windows),
        samples=samples,
    )
    callback = LoopCallback(loop, found)
    module = TrainingModule(
        student,
        objective,
        plan,
        hooks=hooks,
        world=world,
        signals=StopSignals(),
        start_step=start,
        shard=placed.prepare(),
        texts=blend.names if (blend := blend_of(windows)) else (),
    )
    with quiet(), determinism(plan.deterministic):
        trainer = lightning_trainer(plan, world, [callback, *callbacks, SavingCallback(callback)], metrics, work)
        try:
            # returns after the last step, or after the step in which a stop signal or an early end was agreed on
            trainer.fit(module, loader(windows, plan, world, start))
        except Exception as error:
            kept = (
                f"The checkpoint of step {callback.saved_step} is kept in {folder}."
                if callback.saved_step
                else "No checkpoint was written yet."
            )
            # raised again with the stage and the checkpoint that is kept, which the loop itself does not know
            if isinstance(error, NonFiniteError):
                raise NonFiniteError(f"{stage}: {error} {kept}") from None
            # out of memory is not one type of error: devices, the host and libraries report it in different ways
            if whose := out_of_memory(error):
                raise MemoryFullError(
                    f"{stage}: {whose} ran out of memory{asked_for(error)}. {_less_memory(plan, windows)} {kept}"
                ) from error
            raise
    if callback.stopped_by is not None:
        say(f"{stage}: stopped after step {module.steps_done}; the same command continues there")
        # the exit codes of a process that the signal had ended, which launchers and shells know
        if callback.stopped_by == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + callback.stopped_by)
    # Lightning has several reasons of its own to leave its loop; a stage that is cut short must never pass for a finished one
    if module.steps_done != plan.total_steps and not callback.ended_early:
        raise RuntimeError(f"{stage}: training ended after step {module.steps_done} of {plan.total_steps}")
    result = FitResult(
        # collective under FSDP2; rank 0 gets the whole student
        student=placed.collect(),
        steps=module.steps_done,
        tokens=callback.tokens,
        seconds=callback.seconds,
        resumed_from=start if found else None,
        metrics=callback.last,
        held_out=facts(callback.standing, plan, callback.model_step) if callback.standing else None,
    )
    return _told(result, stage, say)


def _told(result: FitResult, stage: str, say: Say) -> FitResult:
    """Says which evaluation was best, and what the model is made of."""
    if result.held_out is not None:
        say(f"{stage}: {best_words(result.held_out)}")
    return result


def _less_memory(plan: TrainingPlan, windows: WindowSource) -> str:
    """Settings that need less memory, with their current values."""
    lower = [f"trainer.micro_batch (now {plan.batch.micro_batch})"] if plan.batch.micro_batch > 1 else []
    length = getattr(windows, "seq_length", None)
    lower.append(f"data.seq_length (now {length})" if length else "data.seq_length")
    more = [] if plan.activation_checkpointing else ["set trainer.activation_checkpointing=true"]
    more.append("load the teacher smaller (teacher.load_in: nf4, teacher.placement: offloaded)")
    return f"Lower {' or '.join(lower)}, {', or '.join(more)}; `decoct plan` estimates the memory of each."


def _finished(last: Checkpoint, kept: Checkpoint, placed: Placed, plan: TrainingPlan, hooks: Sequence[StepHook], world: World) -> FitResult:
    """The result of a stage whose steps are all done, on the ranks that have it after training too.

    Args:
        last: The checkpoint after the last step, which has the figures of the stage.
        kept: The checkpoint with the weights that the stage ends with: that one, or the best.
        placed: The student; plan, hooks, world: as in ``fit``.
    """
    student = placed.student
    if world.is_first or not shards(plan.strategy, world):
        student = placed.whole()
        # hooks are started and loaded too: they may add to the student, such as masks and modes of rounding
        views = ParameterViews(student)
        optimizer = build_optimizer(student, plan, views.views)
        for hook in hooks:
            hook.on_start(student, optimizer)
        restore(kept, student, views, optimizer, hooks)
    state, standing = last.state, standing_from(last.state.standing)
    return FitResult(
        student=student.eval(),
        steps=state.step,
        tokens=state.tokens,
        seconds=state.seconds,
        resumed_from=state.step,
        metrics={},
        held_out=facts(standing, plan, kept.state.step) if standing else None,
    )
