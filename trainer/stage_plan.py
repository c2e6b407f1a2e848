"""A training stage in numbers, derived from its settings alone: no model, no text and no training library is needed.

The plan shows these numbers and the stages train by them: learning rates, steps, whose predictions are learned, how the student is spread.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..models.common.errors import UserError
from ..models.settings import LoadIn, Placement, ServedSettings
from .plan import StepPlan, TrainingPlan, default_warmup, derive_batch, derive_seed
from .settings import PretrainSettings, PruneSettings, Strategy, TrainerSettings, TrainingBlock
from .settings_quantization import QatSettings

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
    """Default peak learning rate of a QAT stage. It halves with every extra bit, as the quantization step does: at high widths a larger
    rate destroys more than it recovers."""
    factor = 2.0 ** (3 - settings.weights.bits) * (LORA_FACTOR if settings.lora else 1)
    return float(f"{factor * default_learning_rate('qat', hidden):.2g}")


def derive_steps(settings: TrainingBlock, trainer: TrainerSettings, *, name: str, seq_length: int, ranks: int, seed: int) -> StepPlan:
    """How many steps a stage takes, and the windows of each.

    Args:
        settings: Of the stage.
        trainer: Of the recipe.
        name: Of the stage; its order of windows is drawn from it.
        seq_length: Tokens per window.
        ranks: Processes.
        seed: The recipe's.

    Raises:
        UserError: the stage has neither tokens nor steps, or the batch cannot be cut (``derive_batch``).
    """
    batch = derive_batch(trainer.global_batch_tokens, seq_length, ranks, trainer.micro_batch)
    if settings.steps is None and settings.tokens is None:
        raise UserError(f"{name}: a training stage needs 'tokens' or 'steps'; for example tokens: 10M")
    steps = settings.steps if settings.steps is not None else -(-(settings.tokens or 0) // (batch.global_windows * seq_length))
    # Each stage draws its own order: the same one would show every stage the same first windows.
    return StepPlan(total_steps=steps, batch=batch, seed=derive_seed(seed, name))


def derive_plan(
    settings: TrainingBlock,
    trainer: TrainerSettings,
    steps: StepPlan,
    *,
    kind: str,
    hidden: int,
    strategy: Literal["ddp", "fsdp2"] = "ddp",
    stage_key: str = "",
) -> TrainingPlan:
    """All numbers of a training stage.

    Args:
        settings: Of the stage.
        trainer: Of the recipe.
        steps: Of ``derive_steps``.
        kind: Kind of the stage, from which its learning rate follows.
        hidden: Channels of the student.
        strategy: How several ranks share the student.
        stage_key: What else decides the numbers, for the checkpoints.
    """
    quantizes = isinstance(settings, QatSettings)
    rate = settings.learning_rate or (quantized_rate(settings, hidden) if quantizes else default_learning_rate(kind, hidden))
    scale_rate = None
    if quantizes and settings.scales == "learned":
        scale_rate = settings.scale_learning_rate or rate * SCALE_RATE_SHARE
    total = steps.total_steps
    return TrainingPlan(
        total_steps=total,
        batch=steps.batch,
        seed=steps.seed,
        learning_rate=rate,
        scale_learning_rate=scale_rate,
        warmup=default_warmup(total) if settings.warmup is None else settings.warmup,
        schedule=settings.schedule,
        final_learning_rate=settings.final_learning_rate,
        weight_decay=settings.weight_decay,
        betas=settings.betas,
        gradient_clip=trainer.gradient_clip,
        precision=trainer.precision,
        checkpoint_every=settings.checkpoint_every or max(10, total // 20),
        deterministic=trainer.deterministic,
        num_workers=trainer.num_workers,
        stage_key=stage_key,
        optimizer=trainer.optimizer,
        strategy=strategy,
        activation_checkpointing=trainer.activation_checkpointing,
        compile=trainer.compile,
    )


def trains(settings: Any) -> bool:
    """Whether a stage with these settings takes optimizer steps; pruning does so only when it is given tokens or steps."""
    if isinstance(settings, PruneSettings):
        return settings.tokens is not None or settings.steps is not None
    return isinstance(settings, TrainingBlock)


def learns_from(settings: Any, *, has_teacher: bool) -> Literal["recipe", "input"] | None:
    """Whose predictions a stage learns: the recipe's teacher's or its own input's; None when it learns the text alone, or does not train.

    Args:
        settings: Of the stage, of any kind.
        has_teacher: Whether the recipe has a teacher.
    """
    if not trains(settings) or isinstance(settings, PretrainSettings) or settings.loss.hard_weight == 1.0:
        return None
    return settings.teacher or ("recipe" if has_teacher else "input")


class TeacherWeights(Protocol):
    """What says how a teacher is held: ``TeacherSettings`` of a recipe, or ``TeacherRef`` of a run."""

    @property
    def load_in(self) -> LoadIn:
        """How its weights are held."""
        ...

    @property
    def placement(self) -> Placement:
        """Where they are held."""
        ...

    @property
    def served(self) -> ServedSettings | None:
        """Server that predicts in its place."""
        ...


@dataclass(frozen=True)
class HeldTeacher:
    """The model whose weights lie on the devices for a stage to learn from."""

    whose: Literal["recipe", "input"]
    load_in: LoadIn
    placement: Placement


def held_teacher(settings: Any, teacher: TeacherWeights | None, *, name: str) -> HeldTeacher | None:
    """The model that a stage holds besides its student; None when it learns the text alone, or a server predicts.

    A cached teacher counts: it is there while the cache is filled.

    Args:
        settings: Of the stage, of any kind.
        teacher: The recipe's.
        name: Of the stage, for the message.

    Raises:
        UserError: the stage asks for the recipe's teacher, and there is none.
    """
    whose = learns_from(settings, has_teacher=teacher is not None)
    if whose is None:
        return None
    if whose == "input":
        # what a stage learns from itself is its input as it is
        return HeldTeacher("input", "fp32", "replicated")
    if teacher is None:
        raise UserError(f"{name}: teacher: recipe, but the recipe has no teacher; add one, or set teacher: input")
    return None if teacher.served else HeldTeacher("recipe", teacher.load_in, teacher.placement)


def wanted_strategy(settings: Any, trainer: TrainerSettings, *, name: str) -> Strategy:
    """The strategy that a stage asks for; a stage that trains scales alone is never spread.

    Raises:
        UserError: such a stage, and the recipe says fsdp2.
    """
    if not isinstance(settings, QatSettings) or settings.train != "scales":
        return trainer.strategy
    if trainer.strategy == "fsdp2":
        raise UserError(
            f"{name}: train: scales keeps codes of one byte a weight whole on every rank, and fsdp2 spreads weights; "
            "set trainer.strategy: ddp (or auto)"
        )
    return "ddp"
