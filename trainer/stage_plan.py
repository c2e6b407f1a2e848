"""Numbers of a training stage, derived from its settings without a model, a text or a training library.

``decoct plan`` prints these numbers and the stages train with them: steps, batch, teacher, distribution of the student. Default learning
rates are in ``learning_rates``.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..models.common.errors import UserError
from ..models.settings import LoadIn, Placement, ServedSettings
from .learning_rates import SCALE_RATE_SHARE, default_learning_rate, quantized_rate
from .plan import StepPlan, TrainingPlan, default_warmup, derive_batch, derive_seed
from .settings import ChosenStrategy, PretrainSettings, Strategy, TrainerSettings, TrainingBlock
from .settings_own import OwnStageSettings
from .settings_pruning import PruneSettings
from .settings_quantization import QatSettings, QuantizeSettings


def derive_steps(settings: TrainingBlock, trainer: TrainerSettings, *, name: str, seq_length: int, ranks: int, seed: int) -> StepPlan:
    """Number of steps of a stage, and the windows of each step.

    Args:
        settings: Settings of the stage.
        trainer: Trainer settings of the recipe.
        name: Name of the stage, from which its order of windows is derived.
        seq_length: Tokens per window.
        ranks: Number of processes.
        seed: Seed of the recipe.

    Raises:
        UserError: the stage has neither tokens nor steps, or the batch cannot be cut (``derive_batch``).
    """
    batch = derive_batch(trainer.global_batch_tokens, seq_length, ranks, trainer.micro_batch)
    if settings.steps is None and settings.tokens is None:
        raise UserError(f"{name}: a training stage needs 'tokens' or 'steps'; for example tokens: 10M")
    # negated twice to round up to whole optimizer steps
    steps = settings.steps if settings.steps is not None else -(-(settings.tokens or 0) // (batch.global_windows * seq_length))
    # Each stage draws its own order; with a common one every stage would begin with the same windows.
    return StepPlan(total_steps=steps, batch=batch, seed=derive_seed(seed, name))


def derive_plan(
    settings: TrainingBlock,
    trainer: TrainerSettings,
    steps: StepPlan,
    *,
    kind: str,
    hidden: int,
    strategy: ChosenStrategy = "ddp",
    stage_key: str = "",
) -> TrainingPlan:
    """All numbers of a training stage.

    Args:
        settings: Settings of the stage.
        trainer: Trainer settings of the recipe.
        steps: Result of ``derive_steps``.
        kind: Kind of the stage, which decides the default learning rate.
        hidden: Number of channels of the student.
        strategy: Distribution of the student over ranks.
        stage_key: Hash of everything else that decides the numbers, for the checkpoints.
    """
    quantizes = isinstance(settings, QatSettings)
    if isinstance(settings, PruneSettings) and settings.structured is not None:
        # after a cut nothing is pruned any more
        kind = "distill"
    # 0 is no valid rate, so ``or`` means: not given
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
        # a kill costs at most a twentieth of the stage; short stages do not save after nearly every step
        checkpoint_every=settings.checkpoint_every or max(10, total // 20),
        deterministic=trainer.deterministic,
        num_workers=trainer.num_workers,
        stage_key=stage_key,
        optimizer=trainer.optimizer,
        strategy=strategy,
        activation_checkpointing=trainer.activation_checkpointing,
        compile=trainer.compile,
        result=settings.result,
        early_stopping=settings.early_stopping,
        rate_from_start=kind == "distill" and settings.learning_rate is None and settings.loss.hard_weight < 1,
    )


def trains(settings: Any) -> bool:
    """Whether a stage with these settings takes optimizer steps. A prune stage does so only with ``tokens`` or ``steps``."""
    if isinstance(settings, PruneSettings):
        return settings.tokens is not None or settings.steps is not None
    return isinstance(settings, TrainingBlock)


def reads_text(settings: Any) -> bool:
    """Whether a stage with these settings needs text besides the held-out text, to train or to calibrate on."""
    if isinstance(settings, PruneSettings) and settings.calibrates:
        return True
    if isinstance(settings, OwnStageSettings):
        return settings.part.reads_text
    return trains(settings) or (isinstance(settings, QuantizeSettings) and (settings.calibrates or settings.auto is not None))


def learns_from(settings: Any, *, has_teacher: bool) -> Literal["recipe", "input"] | None:
    """Model whose predictions a stage learns: the teacher of the recipe, or the stage's own input.

    Args:
        settings: Settings of a stage of any kind.
        has_teacher: Whether the recipe has a teacher.

    Returns:
        "recipe" or "input"; None when the stage learns from the text alone or does not train.
    """
    # hard_weight=1 leaves only the cross-entropy term, which needs no teacher
    if not trains(settings) or isinstance(settings, PretrainSettings) or settings.loss.hard_weight == 1.0:
        return None
    # without a teacher in the recipe a stage learns from its own input: pruning and rounding then restore what the model could do before
    return settings.teacher or ("recipe" if has_teacher else "input")


NOTHING_MOVES = (
    "movement scores weights by their gradients, and a student that learns from its own input alone has none before its first weight is "
    "pruned; give the recipe a teacher, or loss: {hard_weight: 0.5}"
)


def moves_nothing(settings: Any, *, has_teacher: bool) -> bool:
    """Whether a stage prunes by movement while its student agrees with its teacher in everything; the arguments are ``learns_from``'s."""
    if not isinstance(settings, PruneSettings) or settings.movement is None:
        return False
    return settings.loss.hard_weight == 0 and learns_from(settings, has_teacher=has_teacher) == "input"


class TeacherWeights(Protocol):
    """Settings of how a teacher is held: ``TeacherSettings`` of a recipe, or ``TeacherRef`` of a run."""

    @property
    def load_in(self) -> LoadIn:
        """Format of its weights in memory."""
        ...

    @property
    def placement(self) -> Placement:
        """Devices that hold its weights."""
        ...

    @property
    def served(self) -> ServedSettings | None:
        """Server that predicts instead; None when the teacher runs here."""
        ...


@dataclass(frozen=True)
class HeldTeacher:
    """A model whose weights are on the devices so that a stage can learn from it."""

    whose: Literal["recipe", "input"]
    load_in: LoadIn
    placement: Placement


def held_teacher(settings: Any, teacher: TeacherWeights | None, *, name: str) -> HeldTeacher | None:
    """Model that a stage holds in addition to its student; None when it learns from the text alone or a server predicts.

    A cached teacher counts, because it is in memory while the cache is filled.

    Args:
        settings: Settings of a stage of any kind.
        teacher: Teacher of the recipe.
        name: Name of the stage, for the message.

    Raises:
        UserError: the stage needs the teacher of the recipe, and the recipe has none.
    """
    whose = learns_from(settings, has_teacher=teacher is not None)
    if whose is None:
        return None
    if whose == "input":
        # load_in and placement are settings of the recipe's teacher; the input is always held whole in fp32
        return HeldTeacher("input", "fp32", "replicated")
    if teacher is None:
        raise UserError(f"{name}: teacher: recipe, but the recipe has no teacher; add one, or set teacher: input")
    # a served teacher takes no memory here
    return None if teacher.served else HeldTeacher("recipe", teacher.load_in, teacher.placement)


def wanted_strategy(settings: Any, trainer: TrainerSettings, *, name: str) -> Strategy:
    """Strategy that a stage asks for. A stage with ``train: scales`` or ``samples`` is never sharded.

    Raises:
        UserError: the recipe sets fsdp2 or hsdp and the stage trains only scales, or samples.
    """
    if isinstance(settings, TrainingBlock) and settings.samples is not None:
        if trainer.strategy in ("fsdp2", "hsdp"):
            raise UserError(
                f"{name}: samples are drawn by the whole student on each rank, each rank its own number of tokens, and {trainer.strategy} "
                "spreads its weights over ranks that would have to compute in step; set trainer.strategy: ddp (or auto), or remove samples"
            )
        return "ddp"
    if not isinstance(settings, QatSettings) or settings.train != "scales":
        return trainer.strategy
    if trainer.strategy in ("fsdp2", "hsdp"):
        raise UserError(
            f"{name}: train: scales keeps codes of one byte a weight whole on every rank, and {trainer.strategy} spreads weights; "
            "set trainer.strategy: ddp (or auto)"
        )
    return "ddp"
