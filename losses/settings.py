"""Settings of a distillation loss: plain data, importable without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from .. import Bounds, check_fields
from .settings_features import FeatureSettings

Divergence = Literal[
    "forward_kl", "reverse_kl", "jsd", "gkd_jsd", "skew_forward_kl", "skew_reverse_kl", "adaptive_kl", "symmetric_kl", "total_variation"
]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
"""All names."""
Beta = Annotated[float, Bounds(gt=0, lt=1, why="use forward_kl or reverse_kl for 0 and 1, where the published form vanishes")]
Alpha = Annotated[float, Bounds(gt=0, lt=1, why="use forward_kl or reverse_kl for 0; at 1 the loss is 0 for every student")]
Balance = Annotated[float, Bounds(gt=0, lt=1, why="use forward_kl for 1 and reverse_kl for 0")]
HeadMass = Annotated[float, Bounds(gt=0, lt=1, why="use forward_kl or reverse_kl for 0 and 1")]

DEFAULT_TEMPERATURE: Mapping[Divergence, float] = dict.fromkeys(DIVERGENCES, 1.0)
"""Softmax temperature of each divergence when the user gives none."""

_DIALS: Mapping[str, tuple[float, tuple[Divergence, ...]]] = {
    "beta": (0.5, ("jsd", "gkd_jsd")),
    "alpha": (0.1, ("skew_forward_kl", "skew_reverse_kl")),
    "balance": (0.5, ("symmetric_kl",)),
    "head_mass": (0.5, ("adaptive_kl",)),
}
"""Field of a divergence's own parameter -> (default, the divergences that have it)."""


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Loss of one training stage: ``(1 - hard_weight) * T^2 * D(teacher, student) + hard_weight * cross-entropy``, and the terms of
    ``features`` with their weights.

    Fields that are not given get their defaults, except parameters that the chosen divergence does not have: those stay None, and giving
    one is an error.
    """

    divergence: Divergence = "forward_kl"
    """Divergence between teacher and student: forward_kl = KL(teacher || student); reverse_kl = KL(student || teacher); jsd = generalised
    Jensen-Shannon divergence / (beta (1 - beta)); gkd_jsd = the same as published, without the division; skew_forward_kl and
    skew_reverse_kl = the skewed divergences of DistiLLM; adaptive_kl and symmetric_kl = mixtures of both KLs; total_variation; or the
    name of one that the recipe imports."""
    temperature: Annotated[float, Bounds(gt=0, why="1.0 leaves the logits as they are")] | None = None
    """Softmax temperature T of both models. It does not apply to the cross-entropy term. Default: 1."""
    t_squared: bool = True
    """Multiply the divergence by T^2, so that gradients keep their size when T changes."""
    beta: Beta | None = None
    """jsd and gkd_jsd: weight of the teacher in the mixture. Default: 0.5."""
    alpha: Alpha | None = None
    """skew_forward_kl and skew_reverse_kl: share of the first distribution that is mixed into the second. Default: 0.1."""
    balance: Balance | None = None
    """symmetric_kl: weight of forward KL; reverse KL gets the rest. Default: 0.5."""
    head_mass: HeadMass | None = None
    """adaptive_kl: teacher probability that makes up the head of the distribution. Default: 0.5."""
    hard_weight: Annotated[float, Bounds(ge=0, le=1, why="0 trains only on the teacher")] = 0.0
    """Weight of the cross-entropy on the labels of the text. 1 trains without a teacher."""
    features: FeatureSettings | None = None
    """Terms on hidden states and attention relations of the teacher, which must run in memory. Default: none."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.features is not None and self.hard_weight == 1:
            raise ValueError(
                "features=... need a teacher, and hard_weight 1 trains without one; lower hard_weight (0.99 leaves almost nothing of the "
                "divergence), or leave features out"
            )
        self._fill_temperature()
        for dial, (default, owners) in _DIALS.items():
            self._fill(dial, default, owners)

    @property
    def scale(self) -> float:
        """Factor on the divergence: its weight times T^2."""
        # only with hard_weight 1, where there is no divergence
        if self.temperature is None:
            return 0.0
        return (1 - self.hard_weight) * (self.temperature**2 if self.t_squared else 1.0)

    def _fill_temperature(self) -> None:
        if self.temperature is None:
            if self.hard_weight < 1:
                # the dataclass is frozen: defaults can only be written past its own __setattr__
                object.__setattr__(self, "temperature", DEFAULT_TEMPERATURE.get(self.divergence, 1.0))
            return
        if self.hard_weight == 1:
            raise ValueError(
                f"temperature={self.temperature} has no effect: with hard_weight 1 the loss is cross-entropy alone, without a temperature; "
                "leave it out"
            )

    def _fill(self, dial: str, default: float, owners: tuple[Divergence, ...]) -> None:
        """Fills in a parameter's default; raises ValueError if the divergence has no such parameter."""
        # a parameter of another divergence is an error: ignored silently, it would leave the user with a loss that was not chosen
        value = getattr(self, dial)
        if self.divergence not in owners:
            if value is not None:
                has = " and ".join(owners)
                raise ValueError(f"{dial}={value} has no effect: it belongs to {has}, and divergence is {self.divergence}; leave it out")
        elif value is None:
            object.__setattr__(self, dial, default)
