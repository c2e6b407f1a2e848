"""Lightning callback of a stage: restores before the first step; runs hooks, metrics, progress and checkpoints after each step."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from ...models.common.errors import UserError
from ...models.common.host_memory import peak_bytes
from ..checkpoints.read import Checkpoint, TrainingState
from ..checkpoints.write import save_checkpoint
from ..data.blend import Blend
from ..plan import TrainingPlan, derive_seed
from ..processes.world import World, value_of_first
from ..progress import Progress
from .checkpoint_tensors import restore, state_groups
from .held_out import HeldOut, held_out_text
from .hooks import Shaping
from .metrics import MetricsSink
from .module import StepRecord, TrainingModule
from .resuming import Say, best_checkpoint
from .rng import capture_generators, restore_generators, seed_generators
from .samples import Samples
from .standing import Standing, ending_words, ends_early, figure_of, judged, standing_from


@dataclass(frozen=True, kw_only=True)
class StageLoop:
    """Everything around one stage's training that does not affect its numbers, with the plan."""

    stage: str
    plan: TrainingPlan
    folder: Path
    """Folder of the checkpoints."""
    world: World
    metrics: MetricsSink
    progress: Progress
    say: Say
    held_out: HeldOut | None = None
    """Evaluates the student during training; None = no evaluation."""
    windows: int = 0
    """Training windows of the text, for the share of it that was seen; 0 = unknown."""
    blend: Blend | None = None
    """Shares of the texts that the windows belong to; None for one text."""
    samples: Samples | None = None
    """Replaces windows by samples before they are trained on; None = the given text alone."""


class LoopCallback(pl.Callback):
    """The Lightning callback of a ``StageLoop``. Afterwards ``tokens``, ``seconds`` and ``last`` hold the stage's figures."""

    def __init__(self, loop: StageLoop, checkpoint: Checkpoint | None) -> None:
        self.loop = loop
        self.checkpoint = checkpoint
        self.tokens = checkpoint.state.tokens if checkpoint else 0
        self.saved_step = checkpoint.state.step if checkpoint else 0
        self.stopped_by: int | None = None
        self.last: Mapping[str, float | int | None] = {}
        self.standing = standing_from(checkpoint.state.standing) if checkpoint else None
        self.model_step = self.saved_step
        """The step whose weights the student has at the end."""
        self._drawn: Mapping[str, float | int | None] = {}
        self._before: Standing | None = None
        self._save_due: int | None = None
        self._seconds_before = checkpoint.state.seconds if checkpoint else 0.0
        self._begun = self._step_begun = time.perf_counter()

    @property
    def ended_early(self) -> bool:
        """Whether evaluations have ended the stage before its last step."""
        return self.standing is not None and self.standing.ended

    @property
    def seconds(self) -> float:
        """Training time over all starts."""
        return self._seconds_before + time.perf_counter() - self._begun

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restores a checkpoint, or seeds the generators and starts at the first step, once everything is on its device."""
        assert isinstance(pl_module, TrainingModule)
        loop, optimizer = self.loop, trainer.optimizers[0]
        # hooks first: they may add buffers and masks that the checkpoint restores
        for hook in pl_module.hooks:
            hook.on_start(pl_module.student, optimizer)
        if self.checkpoint is not None:
            restore(self.checkpoint, pl_module.student, pl_module.views, optimizer, pl_module.hooks)
        # last, so that nothing in the set-up before can draw from them
        self._set_generators(pl_module.device)
        pl_module.signals.install()
        if pl_module.device.type == "cuda":
            # the peak in the metrics is that of this stage
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._begun = self._step_begun = time.perf_counter()
        loop.progress.start(loop.stage, loop.plan.total_steps, pl_module.steps_done)
        if loop.held_out is not None and self.checkpoint is None:
            # the figures of the unchanged student: the point from which the curve of this stage starts. A resumed stage has that line
            # already
            loop.metrics.write(loop.stage, 0, {"tokens": 0, **self._evaluate(trainer, pl_module, 0)})
            self._step_begun = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Before a micro-batch: draws samples if they are due, and puts them into the batch."""
        assert isinstance(pl_module, TrainingModule)
        loop = self.loop
        if loop.samples is None:
            return
        began = time.perf_counter()
        # each start begins with the first micro-batch of a step, and counts from 0
        micro = batch_idx % loop.plan.batch.accumulation
        if micro == 0:
            context = trainer.precision_plugin.forward_context()
            self._drawn = loop.samples.prepare(pl_module, pl_module.steps_done, context, loop.world, loop.say)
            # the speed of training is without that of sampling, which has a figure of its own
            self._step_begun += time.perf_counter() - began
        loop.samples.fill(batch, pl_module.steps_done, micro, loop.world)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the last micro-batch of a step: runs hooks, evaluates if it is time, and writes one metrics line."""
        assert isinstance(pl_module, TrainingModule)
        # Lightning calls this after every micro-batch; only the one that ended an optimizer step has left a record
        record = pl_module.take_record()
        if record is None:
            return
        # before evaluation and checkpoint, which must see the student as the hooks leave it
        for hook in pl_module.hooks:
            hook.after_step(record.step)
        speed = record.input_tokens / max(time.perf_counter() - self._step_begun, 1e-9)
        plan, held_out = self.loop.plan, self.loop.held_out
        # a function of the step alone, so all ranks evaluate together, which a sharded student needs
        due = held_out is not None and held_out.due(record.step, plan.total_steps)
        # the line of metrics comes before the checkpoint: a crash in between leaves a line too many, and the next start drops it
        # (``rewind``)
        seen = self._evaluate(trainer, pl_module, record.step) if due else {}
        best = due and self._judge(pl_module, record, seen)
        self._log(pl_module, record, speed, {**seen, **(self._decided() if due else {})})
        self.stopped_by = record.stop
        ends = record.stop is not None or self.ended_early
        last = record.step == plan.total_steps or ends
        saves = last or record.step % plan.checkpoint_every == 0 or (best and plan.result == "best")
        self._save_due = record.step if saves else None

    def end_step(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Writes the checkpoint of a step if one is due, after all callbacks have seen the step."""
        step, self._save_due = self._save_due, None
        if step is None:
            return
        # saving is collective. Every rank comes here: the step is the same everywhere, ``stop`` was summed over ranks with the losses, and
        # the first rank has judged for all
        self._save(module, trainer.optimizers[0], step)
        # the time of a save is no part of the next step's speed
        self._step_begun = time.perf_counter()
        if self.stopped_by is not None or self.ended_early:
            # Lightning leaves its loop after this micro-batch, which ended a step: nothing of a half accumulated step is lost
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the loop has ended without an exception; puts the best weights into the student if the stage ends with them."""
        assert isinstance(pl_module, TrainingModule)
        self.model_step = pl_module.steps_done
        loop = self.loop
        # here and not after the loop: each rank still holds its part of the student on its own device
        if self.stopped_by is None and (best := best_checkpoint(loop.folder, loop.plan, self.standing, loop.world, loop.stage, loop.say)):
            restore(best, pl_module.student, pl_module.views, trainer.optimizers[0], pl_module.hooks)
            self.model_step = best.state.step
        self._end(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Called when the loop has ended with an exception, which is raised further."""
        self._end(pl_module)

    def _end(self, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        pl_module.signals.uninstall()
        self.loop.progress.stop()

    def _set_generators(self, device: torch.device) -> None:
        loop, step = self.loop, self.saved_step
        saved = self.checkpoint.generators(loop.world.rank) if self.checkpoint else None
        if saved is not None:
            restore_generators(saved, device)
            return
        if self.checkpoint is not None:
            loop.say(
                f"{loop.stage}: the checkpoint has no generator state of rank {loop.world.rank}; dropout gets a new seed from step {step}"
            )
        # the step is part of the seed: with more ranks than before, the new ones must not repeat their first steps' dropout
        seed_generators(derive_seed(loop.plan.seed, "dropout", loop.world.rank, step))

    def _evaluate(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> dict[str, float | None]:
        """Prints and returns the held-out figures after ``step``."""
        assert self.loop.held_out is not None
        figures = self.loop.held_out.evaluate(module, trainer.precision_plugin.forward_context(), self.loop.world)
        if text := held_out_text(figures):
            self.loop.say(f"{self.loop.stage}  step {step}/{self.loop.plan.total_steps}  {text}")
        return figures

    def _judge(self, module: TrainingModule, record: StepRecord, seen: Mapping[str, float | None]) -> bool:
        """Counts an evaluation; returns whether it is the best so far. The first rank decides for all."""
        loop, plan = self.loop, self.loop.plan
        assert loop.held_out is not None
        # functions of the step alone. While the rate rises, or before the student has the form that the stage promises (its sparsity, its
        # bits), an evaluation measures something else than the result
        if record.step <= plan.warmup_steps or not all(hook.reached(record.step) for hook in module.hooks if isinstance(hook, Shaping)):
            return False
        figure, rule = loop.held_out.figure, plan.early_stopping
        self._before = self.standing
        after = judged(self.standing, record.step, figure, figure_of(figure, seen), rule.min_change if rule else 0.0)
        # sums over ranks could differ in the last bit, and ranks that decide for themselves would wait for each other for ever
        best = after is not None and after.best_step == record.step
        verdict = value_of_first(best + 2 * ends_early(after, plan))
        if after is not None and verdict & 2:
            after = replace(after, ended=True)
            loop.say(f"{loop.stage} {ending_words(after, plan, record.values['learning_rate'] or 0.0)}")
        self.standing = after
        return bool(verdict & 1)

    def _decided(self) -> dict[str, float | None]:
        """Numbers that tell why a stage ends early, or does not yet."""
        if self.standing is None or self.loop.plan.early_stopping is None:
            return {}
        return {"evaluations_since_better": self.standing.since, **({"ended_early": 1} if self.standing.ended else {})}

    def _log(self, module: TrainingModule, record: StepRecord, speed: float, held_out: Mapping[str, float | None]) -> None:
        self.tokens += record.input_tokens
        self._step_begun = time.perf_counter()
        plan, device = self.loop.plan, module.device
        self.last = {
            "tokens": self.tokens,
            **record.values,
            **self._drawn,
            **held_out,
            "tokens_per_second": speed,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes(),
            "data_epochs": record.step * plan.batch.global_windows / self.loop.windows if self.loop.windows else None,
            **self._epochs(record.step),
            "seconds": self.seconds,
        }
        self.loop.metrics.write(self.loop.stage, record.step, self.last)
        self.loop.progress.update(record.step, record.values["loss"], record.input_tokens)

    def _epochs(self, step: int) -> dict[str, float]:
        """How often each text of a blend has been read."""
        blend = self.loop.blend
        taken = blend.epochs(step * self.loop.plan.batch.global_windows) if blend else {}
        return {f"data_epochs.{name}": epochs for name, epochs in taken.items()}

    def _save(self, module: TrainingModule, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Saves a checkpoint, each rank its part. A failed save is reported and training goes on, except after the last step."""
        loop = self.loop
        state = TrainingState(
            step=step,
            # for readers of the file; a resume derives the position from the step
            sample_index=step * loop.plan.batch.global_windows,
            tokens=self.tokens,
            seconds=self.seconds,
            world=loop.world.size,
            plan=loop.plan.identity(),
            best=self.standing.best_step if self.standing and loop.plan.result == "best" else None,
            standing=self.standing.plain() if self.standing else None,
        )
        try:
            groups = state_groups(module.student, module.views, optimizer, module.hooks)
            save_checkpoint(loop.folder, state, groups, capture_generators(module.device), loop.world, before=loop.metrics.flush)
        except UserError as error:
            self._save_failed(step, str(error))
        else:
            self.saved_step = step

    def _save_failed(self, step: int, problem: str) -> None:
        # without this checkpoint the process would end and lose the steps since the one before
        if step == self.loop.plan.total_steps or self.stopped_by is not None or self.ended_early:
            raise UserError(
                f"the checkpoint of step {step} could not be written: {problem}. Earlier checkpoints are unchanged "
                f"(the newest is of step {self.saved_step}). Make room and run again: training continues there."
            )
        if self.loop.plan.result == "best" and self.standing is not None and self.standing.best_step == step:
            # what is the best must be on the disk; patience goes on as after a better evaluation
            self.standing = None if self._before is None else replace(self._before, last_step=step, last=self.standing.last, since=0)
        self.loop.say(
            f"{self.loop.stage}: the checkpoint of step {step} could not be written ({problem}); training goes on, "
            "and earlier checkpoints are kept"
        )
