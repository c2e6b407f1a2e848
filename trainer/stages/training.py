"""The part that every training stage shares: open student and teacher, derive the plan, fit, keep zeros."""

from collections.abc import Sequence
from typing import Any

from ...models.dimensions import hidden_size
from ...models.teachers import Teacher
from ..loop.fit import fit
from ..loop.held_out import HeldOut, derive_watch
from ..loop.hooks import StepHook
from ..loop.objective import Objective
from ..plan import StepPlan, TrainingPlan
from ..processes.world import current_world
from ..settings import TrainingBlock
from ..soft_targets.cached import SparseTeacher
from ..stage_plan import derive_plan, derive_steps
from .context import StageContext, Trained
from .student_and_teacher import OpenStudent, stage_teacher


def training_steps(settings: TrainingBlock, context: StageContext) -> StepPlan:
    """The stage's steps and the windows of each."""
    return derive_steps(
        settings,
        context.trainer,
        name=context.name,
        seq_length=context.data.train.seq_length,
        ranks=current_world().size,
        seed=context.seed,
    )


def training_plan(settings: TrainingBlock, context: StageContext, student: OpenStudent) -> TrainingPlan:
    """The stage's plan for this student, all derived values filled in."""
    return derive_plan(
        settings,
        context.trainer,
        training_steps(settings, context),
        kind=context.kind,
        hidden=hidden_size(student.model),
        strategy=student.strategy,
        stage_key=context.key,
    )


def fill_cache(settings: TrainingBlock, context: StageContext) -> None:
    """Let the recipe's teacher predict what the stage will need of it, without training (all ranks)."""
    stage_teacher(settings, context, training_steps(settings, context))


def train_student(
    student: OpenStudent,
    settings: TrainingBlock,
    context: StageContext,
    plan: TrainingPlan,
    *,
    hooks: Sequence[StepHook] = (),
    facts: dict[str, Any] | None = None,
) -> Trained:
    """Fit ``student`` by ``plan``, on all ranks; resumes from the stage's checkpoints."""
    teacher = stage_teacher(settings, context, plan)
    _announce(context, plan, teacher)
    objective = Objective(teacher, settings.loss, v_eff=context.v_eff)
    held_out = _held_out(context, plan, teacher)
    result = fit(
        student.model,
        objective,
        context.data.train,
        plan,
        work=context.folder,
        stage=context.name,
        hooks=hooks,
        metrics=context.metrics,
        console=context.console,
        weights=student.weights,
        held_out=held_out,
    )
    return Trained(student=result.student, tokens=result.tokens, seconds=result.seconds, facts=facts or {})


def _announce(context: StageContext, plan: TrainingPlan, teacher: Teacher | SparseTeacher | None) -> None:
    """Print what was derived, so that nobody has to guess a default."""
    learns = "from the text alone" if teacher is None else f"from {teacher.describe()}"
    tokens = plan.total_steps * plan.batch.global_windows * context.data.train.seq_length
    context.say(
        f"  {plan.total_steps} steps of {plan.batch.global_windows} windows x {context.data.train.seq_length} tokens ({tokens:,} in all), "
        f"micro-batch {plan.batch.micro_batch} x {plan.batch.accumulation}, peak learning rate {plan.learning_rate:g}, {learns}"
    )
    if options := _options(plan):
        context.say(f"  {options}")


def _held_out(context: StageContext, plan: TrainingPlan, teacher: Teacher | SparseTeacher | None) -> HeldOut | None:
    """What the stage is evaluated on while it trains."""
    text = context.data.evaluation
    watch = derive_watch(
        context.trainer.evaluate_every,
        total_steps=plan.total_steps,
        step_windows=plan.batch.global_windows,
        seq_length=text.seq_length,
        available=len(text),
        ranks=current_world().size,
    )
    if watch is None:
        return None
    plural = "s" if watch.every > 1 else ""
    context.say(
        f"  evaluated every {watch.every} step{plural} on {watch.windows * text.seq_length:,} held-out tokens (trainer.evaluate_every)"
    )
    return HeldOut(text, watch, teacher, context.v_eff)


def _options(plan: TrainingPlan) -> str:
    """What differs from one plain process; '' when nothing does."""
    ranks = current_world().size
    named = {
        f"{ranks} processes ({plan.strategy})": ranks > 1,
        f"optimizer {plan.optimizer}": plan.optimizer != "adamw",
        "activation checkpointing": plan.activation_checkpointing,
        "compiled layers": plan.compile,
    }
    return ", ".join(text for text, used in named.items() if used)
