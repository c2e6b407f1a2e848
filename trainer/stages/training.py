"""The part that every training stage shares: open student and teacher, derive the plan, fit, keep zeros."""

from collections.abc import Sequence
from typing import Any, Literal

from ...models.common.errors import UserError
from ...models.dimensions import hidden_size
from ...models.teachers import Teacher
from ..batch import derive_batch
from ..loop.fit import fit
from ..loop.held_out import HeldOut, derive_watch
from ..loop.hooks import StepHook
from ..loop.objective import Objective
from ..loop.rng import derive_seed
from ..plan import TrainingPlan
from ..processes.world import current_world
from ..schedule import default_warmup
from ..settings import TrainerSettings, TrainingBlock
from ..settings_quantization import QatSettings
from ..soft_targets.cached import SparseTeacher
from .context import StageContext, Trained
from .student_and_teacher import OpenStudent, stage_teacher

# Peak rate at 192 hidden channels; it falls with 1 / hidden (muP's rule for AdamW matrices, arXiv 2203.03466, table 3).
BASE_RATES = {"pretrain": 3e-3, "distill": 1.5e-3, "prune": 1e-3, "qat": 6e-4}
"""Peak learning rate of each kind of stage at ``BASE_HIDDEN`` channels; of qat at 3 bits."""
LORA_FACTOR = 10
"""Adapters take ten times the rate of weights: the usual relation, not measured here."""
SCALE_RATE_SHARE = 1 / 30
"""Rate of learned scales as a share of the weights': a scale is small, and AdamW's steps are of one size for all."""
BASE_HIDDEN = 192


def default_learning_rate(kind: str, hidden: int) -> float:
    """Peak learning rate of a stage kind for a model of ``hidden`` channels, when the recipe gives none."""
    return float(f"{BASE_RATES[kind] * BASE_HIDDEN / hidden:.2g}")


def quantized_rate(settings: QatSettings, hidden: int) -> float:
    """Peak learning rate of a qat stage: half as much for each bit more, as the lattice's step is, for what is lost is so small at many
    bits that a larger one loses more than it finds."""
    factor = 2.0 ** (3 - settings.weights.bits) * (LORA_FACTOR if settings.lora else 1)
    return float(f"{factor * default_learning_rate('qat', hidden):.2g}")


def training_plan(settings: TrainingBlock, context: StageContext, hidden: int, strategy: Literal["ddp", "fsdp2"] = "ddp") -> TrainingPlan:
    """The stage's plan, all derived values filled in."""
    return derive_plan(
        settings,
        context.trainer,
        kind=context.kind,
        name=context.name,
        hidden=hidden,
        seq_length=context.data.train.seq_length,
        ranks=current_world().size,
        seed=context.seed,
        strategy=strategy,
        stage_key=context.key,
    )


def derive_plan(
    settings: TrainingBlock,
    trainer: TrainerSettings,
    *,
    kind: str,
    name: str,
    hidden: int,
    seq_length: int,
    ranks: int,
    seed: int,
    strategy: Literal["ddp", "fsdp2"] = "ddp",
    stage_key: str = "",
) -> TrainingPlan:
    """A training stage in numbers, from its settings, the trainer's and the student's width; needs no model and no text."""
    quantizes = isinstance(settings, QatSettings)
    rate = settings.learning_rate or (quantized_rate(settings, hidden) if quantizes else default_learning_rate(kind, hidden))
    scale_rate = None
    if quantizes and settings.scales == "learned":
        scale_rate = settings.scale_learning_rate or rate * SCALE_RATE_SHARE
    batch = derive_batch(trainer.global_batch_tokens, seq_length, ranks, trainer.micro_batch)
    step_tokens = batch.global_windows * seq_length
    if settings.steps is None and settings.tokens is None:
        raise UserError(f"{name}: a training stage needs 'tokens' or 'steps'; for example tokens: 10M")
    steps = settings.steps if settings.steps is not None else -(-(settings.tokens or 0) // step_tokens)
    return TrainingPlan(
        total_steps=steps,
        batch=batch,
        learning_rate=rate,
        scale_learning_rate=scale_rate,
        warmup=default_warmup(steps) if settings.warmup is None else settings.warmup,
        schedule=settings.schedule,
        final_learning_rate=settings.final_learning_rate,
        weight_decay=settings.weight_decay,
        betas=settings.betas,
        gradient_clip=trainer.gradient_clip,
        precision=trainer.precision,
        # Each stage draws its own order: the same one would show every stage the same first windows.
        seed=derive_seed(seed, name),
        checkpoint_every=settings.checkpoint_every or max(10, steps // 20),
        deterministic=trainer.deterministic,
        num_workers=trainer.num_workers,
        stage_key=stage_key,
        optimizer=trainer.optimizer,
        strategy=strategy,
        activation_checkpointing=trainer.activation_checkpointing,
        compile=trainer.compile,
    )


def fill_cache(settings: TrainingBlock, context: StageContext) -> None:
    """Let the recipe's teacher predict what the stage will need of it, without training (all ranks)."""
    stage_teacher(settings, context, training_plan(settings, context, BASE_HIDDEN))


def train_student(
    student: OpenStudent,
    settings: TrainingBlock,
    context: StageContext,
    *,
    hooks: Sequence[StepHook] = (),
    facts: dict[str, Any] | None = None,
) -> Trained:
    """Fit ``student`` as the stage's settings say, on all ranks; resumes from the stage's checkpoints."""
    plan = training_plan(settings, context, hidden_size(student.model), student.strategy)
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
