"""Numbers of one training stage: its plan, the split of a step into micro-batches, and the learning rate of each step.

Plain arithmetic without torch. ``stage_plan`` derives a plan once, and its hash goes into the checkpoints of the stage.
"""

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..models.common.errors import UserError
from .settings import ChosenStrategy, Optimizer, Precision, Result
from .settings_watching import EarlyStoppingSettings

# fields of a plan that change speed, memory or saving, but no number beyond rounding
_NOT_NUMBERS = ("batch", "checkpoint_every", "num_workers", "deterministic", "strategy", "activation_checkpointing", "compile")
Schedule = Literal["cosine", "linear", "constant"]
WARMUP = 0.05
"""Default share of the steps over which the rate rises, for stages with many steps."""
_LEAST_WARMUP = 8  # steps
ENOUGH_STEPS = 256
"""Optimizer steps that the default size of a step aims at."""
MOST_WINDOWS = 32
"""Most windows per step by default."""
MICRO_BATCH_TOKENS = 8192
"""Largest number of tokens per micro-batch when ``trainer.micro_batch`` is auto."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """``global_windows == micro_batch * accumulation * number of ranks``."""

    global_windows: int
    """Windows per optimizer step, summed over all ranks."""
    micro_batch: int
    """Windows per forward pass on one rank."""
    accumulation: int
    """Micro-batches per optimizer step on each rank."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The part of a plan that decides which windows a stage sees. It does not depend on the student."""

    total_steps: int
    """Number of optimizer steps."""
    batch: BatchPlan
    """Windows per optimizer step over all ranks, and their split into micro-batches."""
    seed: int = 0
    """Seed of the data order and of dropout."""

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise UserError(f"a training stage of {self.total_steps} steps trains nothing; give 'tokens' or 'steps' of at least one step")


@dataclass(frozen=True, kw_only=True)
class TrainingPlan(StepPlan):
    """All numbers of one training stage."""

    learning_rate: float
    """Peak learning rate."""
    scale_learning_rate: float | None = None
    """Peak learning rate of learned quantization scales; None = ``learning_rate``."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises, [0, 1)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    final_learning_rate: float = 0.1
    """Learning rate of the last step, as a share of the peak rate."""
    precision: Precision = "32"
    """32 = fp32 throughout; bf16-mixed = bf16 matrix products with fp32 master weights."""
    gradient_clip: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    optimizer: Optimizer = "adamw"
    """AdamW with fp32 or 8-bit moments; paged ones may move to host memory."""
    weight_decay: float = 0.0
    """AdamW decay of matrices."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas of the first and second moment."""
    checkpoint_every: int = 100
    """Optimizer steps between checkpoints."""
    deterministic: bool = True
    """Use only deterministic algorithms."""
    strategy: ChosenStrategy = "ddp"
    """Distribution of the student over several ranks; a single rank always holds all of it."""
    activation_checkpointing: bool = False
    """Keep only the inputs of decoder layers and recompute the rest in the backward pass."""
    compile: bool = False
    """Compile each decoder layer with torch.compile."""
    num_workers: int = 0
    """Data loader workers per rank."""
    stage_key: str = ""
    """Stage key: a hash of everything else that decides the numbers (input weights, teacher, data, loss)."""
    result: Result = "last"
    """Weights that the stage ends with: those of the last step, or of the best evaluation."""
    early_stopping: EarlyStoppingSettings | None = None
    """When evaluations end the stage before ``total_steps``."""
    rate_from_start: bool = False
    """Whether the KL of the first step decides which share of ``learning_rate`` is the peak (``learning_rates.rate_at_start``)."""

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises."""
        return warmup_steps(self.warmup, self.total_steps)

    def identity(self) -> dict[str, Any]:
        """The fields that decide the numbers, as JSON types. Those that only affect speed, memory or saving (such as micro-batches)
        are left out."""
        fields = asdict(self)
        for name in _NOT_NUMBERS:
            # a stage may resume with another micro-batch or strategy: the windows per step stay the same
            del fields[name]
        # only where they are asked for, so that checkpoints of earlier versions continue
        if self.result == "last":
            del fields["result"]
        if self.early_stopping is None:
            del fields["early_stopping"]
        if not self.rate_from_start:
            del fields["rate_from_start"]
        return {**fields, "betas": list(self.betas), "global_windows": self.batch.global_windows}


def derive_batch(global_batch_tokens: int, seq_length: int, world: int, micro_batch: int | Literal["auto"]) -> BatchPlan:
    """Split a global batch into windows per rank and micro-batches.

    Args:
        global_batch_tokens: Tokens per optimizer step over all ranks.
        seq_length: Tokens per window.
        world: Number of ranks.
        micro_batch: Windows per forward pass and rank; "auto" = the largest divisor of the rank's share that holds at most 8,192
            tokens (at least one window).

    Raises:
        UserError: the tokens are not a multiple of ``seq_length * world``, or ``micro_batch`` does not divide the rank's share. The
            message names the nearest valid values.
    """
    unit = seq_length * world
    # a window is never split: a step has the same number of whole windows on every rank
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
        # a divisor of the share: the accumulation must be a whole number
        micro_batch = max(size for size in divisors(share) if size == 1 or size * seq_length <= MICRO_BATCH_TOKENS)
    elif micro_batch < 1 or share % micro_batch:
        near = sorted(divisors(share), key=lambda size: (abs(size - micro_batch), size))[:2]
        raise UserError(
            f"trainer.micro_batch={micro_batch} must divide the {share} windows that each of {world} process(es) takes per optimizer "
            f"step; use {' or '.join(str(size) for size in sorted(near))}, or auto"
        )
    return BatchPlan(global_windows=share * world, micro_batch=micro_batch, accumulation=share // micro_batch)


def default_step_windows(tokens: int, seq_length: int, processes: int) -> int:
    """Windows per optimizer step of a stage that is given tokens and no size of its steps: so few that it takes 256 steps, at most 32.

    At equal tokens more and smaller steps end nearer to the teacher, down to a window of 512 tokens (docs/lab-book.md): its predictions are
    no noisy labels that a large batch would have to average out. On the toy 256 steps gain little over 64. The most windows are a choice,
    not a measurement.

    Args:
        tokens: Tokens of the stage.
        seq_length: Tokens per window.
        processes: The result is a multiple of it, as every process takes equally many windows.
    """
    wanted = min(MOST_WINDOWS, tokens // (ENOUGH_STEPS * seq_length))
    return max(processes, wanted // processes * processes)


def divisors(number: int) -> list[int]:
    """All divisors of a positive integer, ascending."""
    small = [size for size in range(1, int(number**0.5) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def default_warmup(total: int) -> float:
    """Default share of ``total`` steps over which the rate rises: 5 %, or 8 steps if that is more, but at most half of the steps.

    The first AdamW steps move every weight by about the full rate, whatever the gradient. At the peak rate they destroy a start near the
    teacher, and a short stage has no time to recover (docs/lab-book.md).
    """
    return max(WARMUP, min(_LEAST_WARMUP, total // 2) / total)


def warmup_steps(warmup: float, total: int) -> int:
    """Steps over which the rate rises, of ``total``: floor(warmup * total), but never all of them."""
    # 1e-9: 0.29 * 100 is 28.999999999999996 in floating point. At least the last step is not warm-up
    return min(math.floor(warmup * total + 1e-9), total - 1)


def learning_rate(step: int, total: int, peak: float, warmup: float, schedule: Schedule, final: float) -> float:
    """Learning rate of optimizer step ``step`` (0-based) of ``total``.

    With ``w = floor(warmup * total)``: ``peak * (step + 1) / (w + 1)`` for the first w steps, ``peak`` at step w, then a decay that
    reaches ``final * peak`` at the last step. ``constant`` stays at the peak. Steps after the last one keep the last rate.

    Args:
        step: Index of the step.
        total: Number of steps.
        peak: Peak rate.
        warmup: Share of the steps over which the rate rises, [0, 1).
        schedule: Shape of the decay.
        final: Rate of the last step as a share of the peak, [0, 1].
    """
    warm = warmup_steps(warmup, total)
    if step < warm:
        # w + 1: the first step already learns, and step w would be the peak
        return peak * (step + 1) / (warm + 1)
    if schedule == "constant":
        return peak
    # from the first step at the peak to the last step, which gets exactly ``final``
    decay_steps = total - 1 - warm
    progress = min(1.0, (step - warm) / decay_steps) if decay_steps > 0 else 0.0
    left = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return peak * (final + (1 - final) * left)


def derive_seed(seed: int, *names: str | int) -> int:
    """Seed for one named purpose: the first 63 bits of the sha256 of the recipe's seed and the names."""
    # a hash and not seed + n: neighbouring seeds and purposes must not share a stream
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    # one bit is dropped, so that the seed fits a signed 64-bit integer
    return int.from_bytes(digest[:8], "big") >> 1
