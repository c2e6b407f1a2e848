"""The numbers of one training stage: TrainingPlan, how a step is cut into micro-batches, the learning rate of each step.

Plain arithmetic: what decides a stage's numbers is derived once (``stage_plan``) and hashed into its checkpoints.
"""

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..models.common.errors import UserError
from .settings import Optimizer, Precision

_NOT_NUMBERS = ("batch", "checkpoint_every", "num_workers", "deterministic", "strategy", "activation_checkpointing", "compile")
Schedule = Literal["cosine", "linear", "constant"]
WARMUP = 0.05
"""Share of the steps of a long stage over which the rate rises, where a recipe says nothing."""
_LEAST_WARMUP = 8  # steps
MICRO_BATCH_TOKENS = 8192
"""Most tokens of a micro-batch when ``trainer.micro_batch`` is auto."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """``global_windows == micro_batch * accumulation * number of ranks``."""

    global_windows: int
    """Windows of one optimizer step over all ranks."""
    micro_batch: int
    """Windows of one forward pass on one rank."""
    accumulation: int
    """Micro-batches of one optimizer step on each rank."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Which windows a stage sees: this part of its plan does not depend on the student."""

    total_steps: int
    """Optimizer steps."""
    batch: BatchPlan
    """Windows of one optimizer step, over all ranks, and how they are cut into micro-batches."""
    seed: int = 0
    """Seed of data order and dropout."""

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise UserError(f"a training stage of {self.total_steps} steps trains nothing; give 'tokens' or 'steps' of at least one step")


@dataclass(frozen=True, kw_only=True)
class TrainingPlan(StepPlan):
    """One training stage in plain numbers."""

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

    def identity(self) -> dict[str, Any]:
        """The JSON-able part that decides the numbers; where and how fast it runs (micro-batches, strategy, workers, saves) is left out."""
        fields = asdict(self)
        for name in _NOT_NUMBERS:
            del fields[name]
        return {**fields, "betas": list(self.betas), "global_windows": self.batch.global_windows}


def derive_batch(global_batch_tokens: int, seq_length: int, world: int, micro_batch: int | Literal["auto"]) -> BatchPlan:
    """Cut ``global_batch_tokens`` tokens of windows of ``seq_length`` tokens over ``world`` ranks.

    Args:
        micro_batch: Windows per forward pass and rank; "auto" = the most that divide the rank's share and hold at most 8,192 tokens
            together (at least one window).

    Raises:
        UserError: the tokens are no multiple of ``seq_length * world``, or ``micro_batch`` does not divide the rank's share; the
            message names the nearest values that do.
    """
    unit = seq_length * world
    if global_batch_tokens < unit or global_batch_tokens % unit:
        below = global_batch_tokens // unit * unit
        nearest = f"{below:,} or {below + unit:,}" if below > 0 else f"{unit:,}"
        ranks = f" x {world} processes" if world > 1 else ""
        raise UserError(
            f"trainer.global_batch_tokens={global_batch_tokens:,} must be a multiple of {unit:,} "
            f"(data.seq_length={seq_length:,}{ranks}); use {nearest}"
        )
    share = global_batch_tokens // unit
    if micro_batch == "auto":
        micro_batch = max(size for size in divisors(share) if size == 1 or size * seq_length <= MICRO_BATCH_TOKENS)
    elif micro_batch < 1 or share % micro_batch:
        near = sorted(divisors(share), key=lambda size: (abs(size - micro_batch), size))[:2]
        raise UserError(
            f"trainer.micro_batch={micro_batch} must divide the {share} windows that each of {world} process(es) takes per optimizer "
            f"step; use {' or '.join(str(size) for size in sorted(near))}, or auto"
        )
    return BatchPlan(global_windows=share * world, micro_batch=micro_batch, accumulation=share // micro_batch)


def divisors(number: int) -> list[int]:
    """All divisors of a positive integer, ascending."""
    small = [size for size in range(1, int(number**0.5) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def default_warmup(total: int) -> float:
    """Share of ``total`` steps over which the rate rises when a recipe does not say: 5 %, or 8 steps where that is more, at most half.

    AdamW's first steps move every weight by the whole rate, whatever the gradient. At the peak they throw away a start near the teacher,
    and a short stage has no time to find it again (docs/lab-book.md).
    """
    return max(WARMUP, min(_LEAST_WARMUP, total // 2) / total)


def learning_rate(step: int, total: int, peak: float, warmup: float, schedule: Schedule, final: float) -> float:
    """Rate of optimizer step ``step`` (0 is the first) of ``total``.

    With ``w = floor(warmup * total)``: ``peak * (step + 1) / (w + 1)`` for the first w steps, ``peak`` at step w, then a decay that
    reaches ``final * peak`` at the last step. ``constant`` stays at the peak. Steps past the last keep the last rate.

    Args:
        warmup: Share of the steps over which the rate rises, [0, 1).
        final: Share of the peak that is left at the last step, [0, 1].
    """
    warm = min(math.floor(warmup * total + 1e-9), total - 1)
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    if schedule == "constant":
        return peak
    decay_steps = total - 1 - warm
    progress = min(1.0, (step - warm) / decay_steps) if decay_steps > 0 else 0.0
    left = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return peak * (final + (1 - final) * left)


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed for one named purpose (63 bits): sha256 of the recipe's seed and the names."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
