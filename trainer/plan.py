"""TrainingPlan: everything that decides the numbers of one training stage, derived once and hashed into its checkpoints."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..models.errors import UserError
from .batch import BatchPlan, derive_batch
from .settings import Precision, TrainerSettings, TrainingBlock


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """One training stage in plain numbers. ``batch.global_windows`` windows per optimizer step, over all ranks."""

    total_steps: int
    """Optimizer steps."""
    batch: BatchPlan
    """Windows of one optimizer step and how they are cut into micro-batches."""
    learning_rate: float
    """Peak rate."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises, [0, 1)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after warm-up."""
    final_learning_rate: float = 0.1
    """Share of the peak kept at the end."""
    seed: int = 0
    """Seed of data order and dropout."""
    precision: Precision = "32"
    """32, or bf16-mixed with fp32 master weights."""
    gradient_clip: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    weight_decay: float = 0.0
    """AdamW decay of matrices."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW moments."""
    checkpoint_every: int = 100
    """Optimizer steps between checkpoints."""
    deterministic: bool = True
    """Deterministic algorithms only."""
    num_workers: int = 0
    """Data loader workers of each rank."""
    stage_key: str = ""
    """Whatever else decides the numbers (input weights, teacher, data, loss): the stage key."""

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise UserError(f"a training stage of {self.total_steps} steps trains nothing; give 'tokens' or 'steps' of at least one step")

    def identity(self) -> dict[str, Any]:
        """The JSON-able part that decides the numbers; where and how fast it runs (micro-batches, workers, saves) is left out."""
        fields = asdict(self)
        for name in ("batch", "checkpoint_every", "num_workers", "deterministic"):
            del fields[name]
        return {**fields, "betas": list(self.betas), "global_windows": self.batch.global_windows}


def plan_training(
    block: TrainingBlock,
    trainer: TrainerSettings,
    *,
    seq_length: int,
    world: int,
    learning_rate: float,
    seed: int,
    stage_key: str = "",
) -> TrainingPlan:
    """Derive the plan of a stage. ``learning_rate`` is the stage kind's default peak, used when the block names none.

    Raises: UserError when neither tokens nor steps are given, or the batch cannot be cut evenly.
    """
    batch = derive_batch(trainer.global_batch_tokens, seq_length, world, trainer.micro_batch)
    if block.steps is not None:
        steps = block.steps
    elif block.tokens is not None:
        steps = math.ceil(block.tokens / (batch.global_windows * seq_length))
    else:
        raise UserError("a training stage needs 'tokens' or 'steps'; for example tokens: 10M")
    return TrainingPlan(
        total_steps=steps,
        batch=batch,
        learning_rate=learning_rate if block.learning_rate is None else block.learning_rate,
        warmup=block.warmup,
        schedule=block.schedule,
        final_learning_rate=block.final_learning_rate,
        seed=seed,
        precision=trainer.precision,
        gradient_clip=trainer.gradient_clip,
        weight_decay=block.weight_decay,
        betas=block.betas,
        checkpoint_every=block.checkpoint_every or max(10, steps // 20),
        deterministic=trainer.deterministic,
        num_workers=trainer.num_workers,
        stage_key=stage_key,
    )
