"""Default peak learning rates: by the kind of stage, the width of the model, for QAT the bits of its weights, and for distilling the KL at
the start."""

import math

from .settings_quantization import QatSettings

# Peak rate at 192 hidden channels; it falls with 1 / hidden (muP's rule for AdamW matrices, arXiv 2203.03466, table 3).
BASE_RATES = {"pretrain": 3e-3, "distill": 1.5e-3, "prune": 1e-3, "qat": 6e-4}
"""Peak learning rate of each kind of stage at ``BASE_HIDDEN`` channels; for qat at 3 bits."""
LOCAL_RATE = 1.5e-3
"""Peak rate of local distillation at ``BASE_HIDDEN`` channels (docs/lab-book.md)."""
LORA_FACTOR = 10
"""Adapters train at ten times the rate of weights. This is the usual factor, not measured here."""
SCALE_RATE_SHARE = 1 / 30
"""Rate of learned scales as a share of the rate of weights: scales are small numbers, and AdamW steps have the same size for all."""
BASE_HIDDEN = 192
FAR_KL = 4.0
"""KL to the teacher in nats from which on a student learns at the whole default rate."""
_NEAREST_KL = 1e-4
"""A student that is its own teacher still learns."""


def default_learning_rate(kind: str, hidden: int) -> float:
    """Default peak learning rate of a stage kind for a model with ``hidden`` channels, rounded to two digits."""
    return float(f"{BASE_RATES[kind] * BASE_HIDDEN / hidden:.2g}")


def local_rate(hidden: int) -> float:
    """Default peak learning rate of local distillation for a model with ``hidden`` channels, rounded to two digits."""
    return float(f"{LOCAL_RATE * BASE_HIDDEN / hidden:.2g}")


def rate_at_start(kl: float) -> float:
    """Share of the default rate at which a student learns that starts at ``kl`` nats from its teacher: ``sqrt(kl / 4)``, at most 1.

    An AdamW step moves every weight by about the rate, however small its gradient is. The nearer the student is, the less there is to win
    and the more such a step destroys (docs/lab-book.md).
    """
    # a KL that is not finite says nothing about a distance
    if not math.isfinite(kl):
        return 1.0
    return min(1.0, math.sqrt(max(kl, _NEAREST_KL) / FAR_KL))


def quantized_rate(settings: QatSettings, hidden: int) -> float:
    """Default peak learning rate of a QAT stage. It halves with every extra bit, as the quantization step does: at high widths a larger
    rate destroys more than it recovers."""
    # BASE_RATES['qat'] holds at 3 bits
    factor = 2.0 ** (3 - settings.weights.bits) * (LORA_FACTOR if settings.lora else 1)
    return float(f"{factor * default_learning_rate('qat', hidden):.2g}")
