"""TrainingPlan: everything that decides the numbers of one training stage, derived once and hashed into its checkpoints."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..models.common.errors import UserError
from .batch import BatchPlan
from .settings import Optimizer, Precision

_NOT_NUMBERS = ("batch", "checkpoint_every", "num_workers", "deterministic", "strategy", "activation_checkpointing", "compile")


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """One training stage in plain numbers. ``batch.global_windows`` windows per optimizer step, over all ranks."""

    total_steps: int
    """Optimizer steps."""
    batch: BatchPlan
    """Windows of one optimizer step and how they are cut into micro-batches."""
    learning_rate: float
    """Peak rate."""
    scale_learning_rate: float | None = None
    """Peak rate of quantizers' scales; None = that of everything else."""
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
    optimizer: Optimizer = "adamw"
    """Precision and place of the moments."""
    weight_decay: float = 0.0
    """AdamW decay of matrices."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW moments."""
    checkpoint_every: int = 100
    """Optimizer steps between checkpoints."""
    deterministic: bool = True
    """Deterministic algorithms only."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """How several ranks share the student; one rank holds it all."""
    activation_checkpointing: bool = False
    """Keep the inputs of decoder layers only, and compute the rest again in the backward pass."""
    compile: bool = False
    """torch.compile each decoder layer."""
    num_workers: int = 0
    """Data loader workers of each rank."""
    stage_key: str = ""
    """Whatever else decides the numbers (input weights, teacher, data, loss): the stage key."""

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise UserError(f"a training stage of {self.total_steps} steps trains nothing; give 'tokens' or 'steps' of at least one step")

    def identity(self) -> dict[str, Any]:
        """The JSON-able part that decides the numbers; where and how fast it runs (micro-batches, strategy, workers, saves) is left out."""
        fields = asdict(self)
        for name in _NOT_NUMBERS:
            del fields[name]
        return {**fields, "betas": list(self.betas), "global_windows": self.batch.global_windows}
