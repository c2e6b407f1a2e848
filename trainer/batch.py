"""How the windows of one optimizer step are cut into micro-batches over ranks."""

from dataclasses import dataclass
from typing import Literal

from ..models.common.errors import UserError

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
