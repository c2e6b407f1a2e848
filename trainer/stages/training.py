"""The part that every training stage shares: open student and teacher, derive the plan, fit, keep zeros."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...models.errors import UserError
from ...models.families import decoder_linears
from ...models.folder import read_record
from ...models.loading import load_model
from ...models.teachers import LocalTeacher, load_teacher
from ..batch import derive_batch
from ..fit import fit
from ..hooks import KeepZeros, StepHook
from ..objective import Objective
from ..plan import TrainingPlan
from ..rng import derive_seed
from ..settings import TrainingBlock
from ..world import current_world
from .context import StageContext, Trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Peak rate at 192 hidden channels; it falls with 1 / hidden (muP's rule for AdamW matrices, arXiv 2203.03466, table 3).
_BASE_RATES = {"pretrain": 3e-3, "distill": 1.5e-3, "prune": 1e-3, "qat": 6e-4}
_BASE_HIDDEN = 192


def default_learning_rate(kind: str, hidden: int) -> float:
    """Peak learning rate of a stage kind for a model of ``hidden`` channels, when the recipe gives none."""
    return float(f"{_BASE_RATES[kind] * _BASE_HIDDEN / hidden:.2g}")


def open_student(context: StageContext) -> "PreTrainedModel":
    """The stage's input with fp32 master weights."""
    return load_model(context.input, dtype=torch.float32, revision=context.input_revision)


def open_teacher(settings: TrainingBlock, context: StageContext) -> LocalTeacher | None:
    """The teacher that the stage learns from; None when its loss needs none."""
    if settings.loss.hard_weight == 1.0:
        return None
    choice = settings.teacher or ("recipe" if context.teacher else "input")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if choice == "input":
        return load_teacher(context.input, dtype=torch.float32, v_eff=context.v_eff, revision=context.input_revision, name="its own input")
    if context.teacher is None:
        raise UserError(f"{context.name}: teacher: recipe, but the recipe has no teacher; add one, or set teacher: input")
    ref = context.teacher
    return load_teacher(ref.path, dtype=dtype[ref.load_in], v_eff=context.v_eff, revision=ref.revision, name=ref.name)


def training_plan(settings: TrainingBlock, context: StageContext, hidden: int) -> TrainingPlan:
    """The stage's plan, all derived values filled in."""
    batch = derive_batch(
        context.trainer.global_batch_tokens, context.data.train.seq_length, current_world().size, context.trainer.micro_batch
    )
    step_tokens = batch.global_windows * context.data.train.seq_length
    if settings.steps is None and settings.tokens is None:
        raise UserError(f"{context.name}: a training stage needs 'tokens' or 'steps'; for example tokens: 10M")
    steps = settings.steps if settings.steps is not None else -(-(settings.tokens or 0) // step_tokens)
    return TrainingPlan(
        total_steps=steps,
        batch=batch,
        learning_rate=settings.learning_rate or default_learning_rate(context.kind, hidden),
        warmup=settings.warmup,
        schedule=settings.schedule,
        final_learning_rate=settings.final_learning_rate,
        weight_decay=settings.weight_decay,
        betas=settings.betas,
        gradient_clip=context.trainer.gradient_clip,
        precision=context.trainer.precision,
        # Each stage draws its own order: the same one would show every stage the same first windows.
        seed=derive_seed(context.seed, context.name),
        checkpoint_every=settings.checkpoint_every or max(10, steps // 20),
        deterministic=context.trainer.deterministic,
        num_workers=context.trainer.num_workers,
        stage_key=context.key,
    )


def sparse_modules(path: str) -> list[str]:
    """Matrices whose exact zeros are a mask, as decoct.json of a local model folder lists them."""
    return list(read_record(Path(path)).get("sparse", [])) if Path(path).is_dir() else []


def keep_zeros_hooks(student: "PreTrainedModel", modules: Sequence[str]) -> list[StepHook]:
    """A hook that keeps the zeros of ``modules``; none when the folder is not sparse."""
    if not modules:
        return []
    linears = decoder_linears(student)
    if lost := [name for name in modules if name not in linears]:
        raise UserError(
            f"decoct.json lists {lost[0]} as sparse, but the model has no such linear layer; the folder was put together from two"
        )
    return [KeepZeros(modules)]


def train_student(
    student: "PreTrainedModel",
    settings: TrainingBlock,
    context: StageContext,
    *,
    hooks: Sequence[StepHook] = (),
    facts: dict[str, Any] | None = None,
) -> Trained:
    """Fit ``student`` as the stage's settings say, on all ranks; resumes from the stage's checkpoints."""
    teacher = open_teacher(settings, context)
    plan = training_plan(settings, context, student.config.hidden_size)
    _announce(context, plan, teacher)
    objective = Objective(teacher, settings.loss, v_eff=context.v_eff)
    result = fit(
        student,
        objective,
        context.data.train,
        plan,
        work=context.folder,
        stage=context.name,
        hooks=hooks,
        metrics=context.metrics,
        console=context.console,
    )
    return Trained(student=result.student, tokens=result.tokens, seconds=result.seconds, facts=facts or {})


def _announce(context: StageContext, plan: TrainingPlan, teacher: LocalTeacher | None) -> None:
    """Print what was derived, so that nobody has to guess a default."""
    learns = "from the text alone" if teacher is None else f"from {teacher.describe()}"
    tokens = plan.total_steps * plan.batch.global_windows * context.data.train.seq_length
    context.say(
        f"  {plan.total_steps} steps of {plan.batch.global_windows} windows x {context.data.train.seq_length} tokens ({tokens:,} in all), "
        f"micro-batch {plan.batch.micro_batch} x {plan.batch.accumulation}, peak learning rate {plan.learning_rate:g}, {learns}"
    )
