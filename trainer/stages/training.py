"""Steps that every training stage shares: derive the plan, open the teacher, fit the student."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...models.common.errors import UserError
from ...models.dimensions import hidden_size
from ...models.teachers import Teacher
from ..data.order import blend_of
from ..loop.fit import fit
from ..loop.held_out import HeldOut, derive_watch
from ..loop.hooks import StepHook
from ..loop.objective import Objective
from ..loop.own_callbacks import own_callbacks
from ..loop.start_rate import StartRate
from ..plan import StepPlan, TrainingPlan
from ..processes.world import current_world
from ..settings import TrainingBlock
from ..settings_pruning import PruneSettings
from ..soft_targets.cached import SparseTeacher
from ..stage_plan import derive_plan, derive_steps
from .blended_text import text_facts
from .context import RunContext, StageContext, StudentRounders, Trained, TrainingContext
from .features import open_features, term_facts
from .sampled_text import open_samples, sample_facts
from .student_and_teacher import OpenStudent, recipe_teacher, stage_teacher


def training_steps(settings: TrainingBlock, run: RunContext, stage: str) -> StepPlan:
    """Step plan of the stage called ``stage``: number of steps and windows per step."""
    return derive_steps(
        settings, run.trainer, name=stage, seq_length=run.data.train.seq_length, ranks=current_world().size, seed=run.seed
    )  # fmt: skip


def training_plan(settings: TrainingBlock, context: TrainingContext, student: OpenStudent) -> TrainingPlan:
    """Training plan of the stage for this student, with all derived values filled in."""
    return derive_plan(
        settings,
        context.run.trainer,
        training_steps(settings, context.run, context.name),
        kind=context.kind,
        hidden=hidden_size(student.model),
        strategy=student.strategy,
        stage_key=context.key,
    )


def fill_cache(settings: TrainingBlock, run: RunContext, stage: str) -> None:
    """Fill the teacher's cache with everything that the stage called ``stage`` needs, without training (all ranks)."""
    if isinstance(settings, PruneSettings) and settings.structured is not None:
        run.say("  cuts in rounds, each of which fills the cache with its own windows when it begins")
        return
    recipe_teacher(settings, run, stage, training_steps(settings, run, stage))


def train_student(
    student: OpenStudent,
    settings: TrainingBlock,
    context: StageContext,
    plan: TrainingPlan,
    *,
    hooks: Sequence[StepHook] = (),
    facts: dict[str, Any] | None = None,
    rounders: StudentRounders | None = None,
) -> Trained:
    """Train ``student`` on the stage's teacher according to ``plan``, on all ranks. Resumes from the stage's checkpoints.

    Args:
        student: The stage's input, after the stage has prepared its modules.
        settings: Settings of the stage.
        context: Context of the stage.
        plan: Result of ``training_plan``.
        hooks: Called around each step, in this order.
        facts: Entries that the stage adds to decoct.json.
        rounders: Hooks of the student from which ``finish`` reads the ranges.
    """
    trained = fit_student(student, settings, context, plan, stage_teacher(settings, context, plan), hooks)
    # the fit knows neither: they belong to the stage
    return replace(trained, facts=facts or {}, rounders=rounders or StudentRounders())


def fit_student(
    student: OpenStudent,
    settings: TrainingBlock,
    context: TrainingContext,
    plan: TrainingPlan,
    teacher: Teacher | SparseTeacher | None,
    hooks: Sequence[StepHook] = (),
) -> Trained:
    """``train_student`` with an open teacher; None trains on the text alone."""
    run = context.run
    _announce(context, plan, teacher)
    features = open_features(settings, student, context, plan, teacher)
    objective = Objective(teacher, settings.loss, v_eff=run.v_eff, features=features)
    samples = open_samples(settings, student, context, plan, teacher)
    held_out = _held_out(context, plan, teacher)
    own = own_callbacks(settings.callbacks)
    start = [StartRate(plan, context.say)] if plan.rate_from_start else []
    # first, so that the gradients that the user's hooks see are those of all ranks
    projectors: list[StepHook] = [features.projectors] if features is not None and features.projectors is not None else []
    result = fit(
        student.model,
        objective,
        run.data.train,
        plan,
        work=context.folder,
        stage=context.name,
        # the user's hooks come first, so that zeros stay zero whatever they do to the weights (law 4, docs/architecture.md)
        hooks=[*projectors, *own.hooks, *hooks, *start],
        callbacks=own.lightning,
        metrics=run.metrics,
        console=run.console,
        weights=student.weights,
        held_out=held_out,
        samples=samples,
    )
    sampled = sample_facts(run.metrics.path, context.name, settings.samples)
    return Trained(
        student=result.student,
        tokens=result.tokens,
        seconds=result.seconds,
        held_out=result.held_out,
        samples=sampled,
        terms=term_facts(run.metrics.path, context.name, settings.loss.features),
        texts=text_facts(run.metrics.path, context.name, run.data.train),
    )


def _announce(context: TrainingContext, plan: TrainingPlan, teacher: Teacher | SparseTeacher | None) -> None:
    """Print the derived values, so that every default is visible in the output."""
    learns = "from the text alone" if teacher is None else f"from {teacher.describe()}"
    # the printed tokens count whole windows, padding included
    length = context.run.data.train.seq_length
    # the first step says how much of it
    most = "at most " if plan.rate_from_start else ""
    tokens = plan.total_steps * plan.batch.global_windows * length
    context.say(
        f"  {plan.total_steps} steps of {plan.batch.global_windows} windows x {length} tokens ({tokens:,} in all), "
        f"micro-batch {plan.batch.micro_batch} x {plan.batch.accumulation}, peak learning rate {most}{plan.learning_rate:g}, {learns}"
    )
    if options := _options(plan):
        context.say(f"  {options}")


def _held_out(context: TrainingContext, plan: TrainingPlan, teacher: Teacher | SparseTeacher | None) -> HeldOut | None:
    """Held-out windows for evaluation during training; None when ``trainer.evaluate_every`` turns it off."""
    text = context.run.data.evaluation
    selects = plan.result == "best" or plan.early_stopping is not None
    watch = derive_watch(
        context.run.trainer.evaluate_every,
        total_steps=plan.total_steps,
        step_windows=plan.batch.global_windows,
        seq_length=text.seq_length,
        # each rank computes the same plan from the same numbers, so all evaluate at the same steps
        available=len(text),
        ranks=current_world().size,
        decides=selects,
        texts=len(blend.names) if (blend := blend_of(text)) else 1,
    )
    if watch is None:
        if selects:
            # a recipe is refused before any work; this is for those who call the stage from Python
            raise UserError(f"{context.name}: result: best and early_stopping need evaluations, and trainer.evaluate_every is 0")
        return None
    plural = "s" if watch.every > 1 else ""
    context.say(
        f"  evaluated every {watch.every} step{plural} on {watch.windows * text.seq_length:,} held-out tokens (trainer.evaluate_every)"
    )
    held_out = HeldOut(text, watch, teacher, context.run.v_eff)
    if selects:
        context.say(f"  {_selecting_words(plan, held_out.figure)}")
    return held_out


def _selecting_words(plan: TrainingPlan, figure: str) -> str:
    """What the evaluations decide, for the output."""
    what = f"lowest held-out {'KL' if figure == 'kl' else 'loss'}"
    parts = [f"ends with the weights of the {what} (result: best)"] if plan.result == "best" else []
    if rule := plan.early_stopping:
        by = f" by at least {rule.min_change:.3g} of it" if rule.min_change else ""
        plural = "s" if rule.patience > 1 else ""
        parts.append(f"ends early after {rule.patience} evaluation{plural} in a row that do not lower the {what}{by} (early_stopping)")
    return "; ".join(parts)


def _options(plan: TrainingPlan) -> str:
    """Options that differ from one process with AdamW, for the output; '' when none differs."""
    ranks = current_world().size
    named = {
        f"{ranks} processes ({plan.strategy})": ranks > 1,
        f"optimizer {plan.optimizer}": plan.optimizer != "adamw",
        "activation checkpointing": plan.activation_checkpointing,
        "compiled layers": plan.compile,
    }
    return ", ".join(text for text, used in named.items() if used)
