"""Settings of a distillation loss: plain data, importable without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Divergence = Literal[
    "forward_kl", "reverse_kl", "jsd", "gkd_jsd", "skew_forward_kl", "skew_reverse_kl", "adaptive_kl", "symmetric_kl", "total_variation"
]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
"""All names."""

DEFAULT_TEMPERATURE: Mapping[Divergence, float] = dict.fromkeys(DIVERGENCES, 1.0)
"""Softmax temperature of each divergence when the user gives none."""

_DIALS: Mapping[str, tuple[float, tuple[Divergence, ...]]] = {
    "beta": (0.5, ("jsd", "gkd_jsd")),
    "alpha": (0.1, ("skew_forward_kl", "skew_reverse_kl")),
    "balance": (0.5, ("symmetric_kl",)),
    "head_mass": (0.5, ("adaptive_kl",)),
}
"""Field of a divergence's own parameter -> (default, the divergences that have it)."""
_ENDS = {
    "beta": "use forward_kl or reverse_kl for 0 and 1, where the published form vanishes",
    "alpha": "use forward_kl or reverse_kl for 0; at 1 the loss is 0 for every student",
    "balance": "use forward_kl for 1 and reverse_kl for 0",
    "head_mass": "use forward_kl or reverse_kl for 0 and 1",
}


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Loss of one training stage: ``(1 - hard_weight) * T^2 * D(teacher, student) + hard_weight * cross-entropy``.

    Fields that are not given get their defaults, except parameters that the chosen divergence does not have: those stay None, and giving
    one is an error.
    """

    divergence: Divergence = "forward_kl"
    """forward_kl = KL(teacher || student); reverse_kl = KL(student || teacher); jsd = generalised JSD / (beta (1 - beta)); gkd_jsd =
    as published; skew_forward_kl, skew_reverse_kl (DistiLLM); adaptive_kl, symmetric_kl = mixtures of both KLs; total_variation."""
    temperature: float | None = None
    """Softmax temperature T of both models, > 0; not applied to the cross-entropy term. Default: 1."""
    t_squared: bool = True
    """Multiply the divergence by T^2, so that gradients keep their size when T changes."""
    beta: float | None = None
    """Weight of the teacher in the mixture of jsd and gkd_jsd, in (0, 1), default 0.5."""
    alpha: float | None = None
    """Skew of skew_forward_kl and skew_reverse_kl: share of the first distribution mixed into the second, in (0, 1), default 0.1."""
    balance: float | None = None
    """Weight of forward KL in symmetric_kl, in (0, 1), default 0.5; reverse KL gets the rest."""
    head_mass: float | None = None
    """Teacher probability that makes up the head of adaptive_kl, in (0, 1), default 0.5."""
    hard_weight: float = 0.0
    """Weight of the cross-entropy on the data's own labels, in [0, 1]. 1 trains without a teacher."""

    def __post_init__(self) -> None:
        if not 0 <= self.hard_weight <= 1:
            raise ValueError(f"hard_weight={self.hard_weight} must lie in [0, 1]; 0 trains on the teacher alone")
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence={self.divergence!r} is not one of {', '.join(DIVERGENCES)}")
        self._fill_temperature()
        for dial, (default, owners) in _DIALS.items():
            self._fill(dial, default, owners)

    @property
    def scale(self) -> float:
        """Factor on the divergence: its weight times T^2."""
        if self.temperature is None:
            return 0.0
        return (1 - self.hard_weight) * (self.temperature**2 if self.t_squared else 1.0)

    def _fill_temperature(self) -> None:
        if self.temperature is None:
            if self.hard_weight < 1:
                # the dataclass is frozen: defaults can only be written past its own __setattr__
                object.__setattr__(self, "temperature", DEFAULT_TEMPERATURE[self.divergence])
            return
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be greater than 0; 1.0 leaves the logits as they are")
        if self.hard_weight == 1:
            raise ValueError(
                f"temperature={self.temperature} has no effect: with hard_weight 1 the loss is cross-entropy alone, without a temperature; "
                "leave it out"
            )

    def _fill(self, dial: str, default: float, owners: tuple[Divergence, ...]) -> None:
        """Fills in a parameter's default; raises ValueError if the divergence has no such parameter or the value is out of range."""
        value = getattr(self, dial)
        if self.divergence not in owners:
            if value is not None:
                has = " and ".join(owners)
                raise ValueError(f"{dial}={value} has no effect: it belongs to {has}, and divergence is {self.divergence}; leave it out")
        elif value is None:
            object.__setattr__(self, dial, default)
        elif not 0 < value < 1:
            raise ValueError(f"{dial}={value} must lie strictly between 0 and 1; {_ENDS[dial]}")
