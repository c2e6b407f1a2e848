"""Numbers that would be accepted by type and mean nothing: limits of single settings, by their dataclass."""

from dataclasses import dataclass
from typing import Any

from ..models.settings import KeepSettings, ScratchSettings
from ..trainer.settings import DataSettings, EvaluateSettings, PruneSettings, StructuredSettings, TrainerSettings, TrainingBlock
from ..trainer.settings_quantization import QatSettings, QuantizeSettings


@dataclass(frozen=True)
class Limits:
    """An interval; an open end is left out of it."""

    low: float
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False

    def allow(self, value: float) -> bool:
        """Whether ``value`` lies inside."""
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def words(self) -> str:
        """The interval in words."""
        low = f"{'greater than' if self.open_low else 'at least'} {self.low:g}"
        if self.high == float("inf"):
            return low
        return f"{low} and {'less than' if self.open_high else 'at most'} {self.high:g}"


_COUNT = Limits(1)
_SHARE = Limits(0, 1)
_NOT_NEGATIVE = Limits(0)
_POSITIVE = Limits(0, open_low=True)

LIMITS: dict[type, dict[str, Limits]] = {
    ScratchSettings: {
        **dict.fromkeys(("hidden", "layers", "heads", "kv_heads", "ffn", "tokens"), _COUNT),
        # 256 bytes and the end-of-text token
        "vocab": Limits(257),
        "learning_rate": _POSITIVE,
    },
    KeepSettings: {"layers": _COUNT},
    DataSettings: {"max_documents": _COUNT},
    TrainerSettings: {
        # whatever a machine has; what this one has is looked at when a run starts
        "devices": Limits(1, 1024),
        "micro_batch": _COUNT,
        "global_batch_tokens": _COUNT,
        "gradient_clip": _NOT_NEGATIVE,
        "num_workers": Limits(0, 1024),
        "evaluate_every": _NOT_NEGATIVE,
    },
    TrainingBlock: {
        "learning_rate": _POSITIVE,
        "warmup": Limits(0, 1, open_high=True),
        "final_learning_rate": _SHARE,
        "weight_decay": _NOT_NEGATIVE,
        "betas": Limits(0, 1, open_high=True),
    },
    StructuredSettings: {"ffn": _COUNT},
    PruneSettings: {"calibration_tokens": _COUNT},
    QuantizeSettings: {"calibration_tokens": _COUNT},
    QatSettings: {"calibration_tokens": _COUNT, "scale_learning_rate": _POSITIVE},
    EvaluateSettings: {"max_perplexity_increase": Limits(-1), "max_kl": _NOT_NEGATIVE, "min_top1": _SHARE},
}


def out_of_range(settings: type, key: str, value: Any) -> str | None:
    """The message for a number (or a list of them) outside the limits of ``key``; None when it is inside, or no number."""
    limits = next((LIMITS[base][key] for base in settings.__mro__ if key in LIMITS.get(base, {})), None)
    numbers = [number for number in (value if isinstance(value, list) else [value]) if type(number) in (int, float)]
    if limits is None or all(limits.allow(number) for number in numbers):
        return None
    given = ", ".join(f"{number:,}" if isinstance(number, int) else f"{number:g}" for number in numbers)
    return f"{given} is out of range; it must be {limits.words()}"
