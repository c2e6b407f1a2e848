"""fit() trains one stage to its last step on Lightning's Trainer, from the start or from the newest checkpoint.

Resuming does not use Lightning's own loop state. Each start builds a loader of exactly the micro-batches that are left; the learning rate
is a function of the step; student, optimizer, hooks and random generators are restored from the newest checkpoint that verifies.
"""

import logging
import os
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...models.common.errors import MemoryFullError, NonFiniteError, UserError
from ...models.common.memory_errors import asked_for, out_of_memory
from ..checkpoints.read import Checkpoint, find_newest_verified, open_checkpoint, prepare_folder, set_aside
from ..data.order import StepBatches
from ..data.windows import WindowSource
from ..plan import TrainingPlan as TrainingPlan
from ..processes.sharding import ParameterViews
from ..processes.strategy import lightning_strategy, shards
from ..processes.world import World, connect, current_world, value_of_first
from ..progress import Progress, make_progress, print_line
from .callback import LoopCallback, Say, StageLoop
from .checkpoint_tensors import restore
from .held_out import HeldOut
from .hooks import StepHook
from .metrics import MetricsSink
from .module import INDEX, Objectivelike, TrainingModule
from .optimizer import build_optimizer
from .placed_student import Placed
from .signals import StopSignals

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from ...models.folder.weights import WeightFiles

_PRECISIONS = {"32": "32-true", "bf16-mixed": "bf16-mixed"}


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """Result of a stage's training over all its starts."""

    student: "PreTrainedModel"
    """The trained student on the CPU, in eval mode: the given object, or under FSDP2 a gathered copy (only on rank 0)."""
    steps: int
    """Optimizer steps."""
    tokens: int
    """Input tokens trained on."""
    seconds: float
    """Training time."""
    resumed_from: int | None
    """Step from which this start continued; None if it began at the first step."""
    metrics: Mapping[str, float | int | None]
    """Numbers of the last step; empty if no step was left."""


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
        callbacks: Lightning callbacks, called after the loop's own.
        weights: Files with the values of a student on the meta device; each rank reads only what it holds.
        console: Console of rank 0 for messages and progress; None = silent.
        progress: Progress display to use instead of the console's own.
        held_out: Evaluates the student before the first step and at intervals; it changes no number of the training.

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
    found = _open_checkpoints(folder, plan, world, stage, say)
    start = found.state.step if found else 0
    # lines of steps after the checkpoint, which are taken again
    metrics.rewind(stage, start)
    # before any loader or trainer is built: a finished stage is only restored
    if found is not None and start == plan.total_steps:
        say(f"{stage}: all {start} steps are done")
        return _finished(found, Placed(student, weights, plan, world), plan, hooks, world)
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
    )
    callback = LoopCallback(loop, found)
    module = TrainingModule(
        student, objective, plan, hooks=hooks, world=world, signals=StopSignals(), start_step=start, shard=placed.prepare()
    )
    with _quiet(), _determinism(plan.deterministic):
        trainer = _trainer(plan, world, [callback, *callbacks], metrics, work)
        try:
            # returns after the last step, or after the step in which a stop signal was agreed on
            trainer.fit(module, _loader(windows, plan, world, start))
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
    if module.steps_done != plan.total_steps:
        raise RuntimeError(f"{stage}: training ended after step {module.steps_done} of {plan.total_steps}")
    return FitResult(
        # collective under FSDP2; rank 0 gets the whole student
        student=placed.collect(),
        steps=plan.total_steps,
        tokens=callback.tokens,
        seconds=callback.seconds,
        resumed_from=start if found else None,
        metrics=callback.last,
    )


class _Indexed(Dataset[dict[str, Tensor]]):
    """Windows with their own index, so that the error about a loss that is not finite can name them."""

    def __init__(self, windows: WindowSource) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**self._windows[index], INDEX: torch.tensor(index)}


def _loader(windows: WindowSource, plan: TrainingPlan, world: World, start: int) -> DataLoader[dict[str, Tensor]]:
    """Loads this rank's micro-batches of the steps that are left, in order."""
    batches = StepBatches(
        windows,
        global_batch=plan.batch.global_windows,
        micro_batch=plan.batch.micro_batch,
        rank=world.rank,
        world=world.size,
        seed=plan.seed,
        start_step=start,
        total_steps=plan.total_steps,
    )
    # the loader draws a worker seed at each start: from the global generator that would change dropout after a resume
    own = torch.Generator().manual_seed(0)
    # pinned host memory lets copies to a GPU run beside its work
    return DataLoader(
        _Indexed(windows), batch_sampler=batches, num_workers=plan.num_workers, generator=own, pin_memory=torch.cuda.is_available()
    )


def _trainer(plan: TrainingPlan, world: World, callbacks: list[pl.Callback], metrics: MetricsSink, work: Path) -> pl.Trainer:
    """A Lightning Trainer with its own checkpoints, progress bars, samplers and process launching switched off."""
    # Named, and not detected: inside a Slurm allocation Lightning would take a single process for one of Slurm's own tasks.
    environment = TorchElasticEnvironment() if "TORCHELASTIC_RUN_ID" in os.environ else LightningEnvironment()
    return pl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=world.local_size,
        num_nodes=world.nodes,
        strategy=lightning_strategy(plan.strategy, world),
        plugins=[environment],
        precision=_PRECISIONS[plan.precision],  # pyright: ignore[reportArgumentType] - a dict's values are plain str
        # Lightning divides each micro-batch's loss by this number; the module multiplies gradients by it (law 1, docs/architecture.md)
        accumulate_grad_batches=plan.batch.accumulation,
        gradient_clip_val=plan.gradient_clip,
        # one pass over the loader, which has exactly the micro-batches that are left
        max_epochs=1,
        logger=metrics.loggers or False,
        callbacks=callbacks,
        default_root_dir=work,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        # the batch sampler already gives each rank its own windows; Lightning would split them a second time
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )


def _open_checkpoints(folder: Path, plan: TrainingPlan, world: World, stage: str, say: Say) -> Checkpoint | None:
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


def _check_same_plan(found: Checkpoint, plan: TrainingPlan, folder: Path) -> None:
    wanted = plan.identity()
    different = [name for name in sorted(wanted.keys() | found.state.plan.keys()) if wanted.get(name) != found.state.plan.get(name)]
    if different:
        changes = ", ".join(f"{name} {found.state.plan.get(name)!r} -> {wanted.get(name)!r}" for name in different)
        raise UserError(
            f"{folder} holds checkpoints of another training plan ({changes}); continuing would mix the two. "
            "Use the old settings, another run folder, or remove these checkpoints."
        )


def _less_memory(plan: TrainingPlan, windows: WindowSource) -> str:
    """Settings that need less memory, with their current values."""
    lower = [f"trainer.micro_batch (now {plan.batch.micro_batch})"] if plan.batch.micro_batch > 1 else []
    length = getattr(windows, "seq_length", None)
    lower.append(f"data.seq_length (now {length})" if length else "data.seq_length")
    more = [] if plan.activation_checkpointing else ["set trainer.activation_checkpointing=true"]
    more.append("load the teacher smaller (teacher.load_in: nf4, teacher.placement: offloaded)")
    return f"Lower {' or '.join(lower)}, {', or '.join(more)}; `decoct plan` estimates the memory of each."


def _finished(found: Checkpoint, placed: Placed, plan: TrainingPlan, hooks: Sequence[StepHook], world: World) -> FitResult:
    """The result of a stage whose steps are all done: the student of the last checkpoint, on the ranks that have it after training too."""
    student = placed.student
    if world.is_first or not shards(plan.strategy, world):
        student = placed.whole()
        # hooks are started and loaded too: they may add to the student, such as masks and modes of rounding
        views = ParameterViews(student)
        optimizer = build_optimizer(student, plan, views.views)
        for hook in hooks:
            hook.on_start(student, optimizer)
        restore(found, student, views, optimizer, hooks)
    state = found.state
    return FitResult(
        student=student.eval(), steps=state.step, tokens=state.tokens, seconds=state.seconds, resumed_from=state.step, metrics={}
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Lightning's messages about devices, tips and features that are switched off on purpose; its errors stay."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    # restored afterwards: a program that uses decoct as a library may use Lightning itself
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            from lightning.fabric.utilities.warnings import PossibleUserWarning

            warnings.simplefilter("ignore", PossibleUserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """Switches deterministic algorithms on during a stage; cuBLAS needs its workspace fixed before its first use."""
    # process-wide switches: evaluation and export after the stage must find them as they were
    before: Any = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
