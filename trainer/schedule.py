"""The learning rate as a pure function of the optimizer step, so that resuming needs no scheduler state."""

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]
WARMUP = 0.05
"""Share of the steps of a long stage over which the rate rises, where a recipe says nothing."""
_LEAST_WARMUP = 8  # steps


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
