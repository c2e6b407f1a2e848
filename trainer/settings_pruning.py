"""Settings of the stage that prunes: the shape of the model, or single weights."""

from dataclasses import dataclass
from typing import ClassVar

from .. import Count
from .settings import TrainingBlock
from .settings_local import LocalSettings
from .settings_sparsity import CALIBRATION_TOKENS, MovementSettings, SparseGptSettings, WandaSettings, WeightSettings
from .settings_sparsity import MagnitudeSettings as MagnitudeSettings
from .settings_structured import StructuredSettings as StructuredSettings


@dataclass(frozen=True, kw_only=True)
class PruneSettings(TrainingBlock):
    """Prune by exactly one method: cut the shape (``structured``), or set single weights to zero. ``structured``, ``wanda`` and
    ``sparsegpt`` are one shot, on calibration text, except that ``structured.rounds`` distils after each cut; ``magnitude`` trains when
    tokens or steps are given, and ``movement`` always does."""

    exactly_one: ClassVar = ("structured", "magnitude", "wanda", "sparsegpt", "movement")

    structured: StructuredSettings | None = None
    """Cut the shape of the model: FFN channels, heads, hidden channels, layers."""
    magnitude: MagnitudeSettings | None = None
    """Set the smallest weights to zero."""
    wanda: WandaSettings | None = None
    """Set to zero the weights that matter least for the outputs of their own row."""
    sparsegpt: SparseGptSettings | None = None
    """Set weights to zero and change the others to make up for it."""
    movement: MovementSettings | None = None
    """Set to zero the weights that training moves towards zero. Needs tokens or steps."""
    calibration_tokens: Count | None = None
    """structured, wanda, sparsegpt: tokens of training text to calibrate on, in windows from all over the text, chosen by the seed.
    Default: 32,768 for structured; 262,144 for wanda and sparsegpt."""
    local: LocalSettings | None = None
    """One-shot methods: let each layer of the pruned model learn its parent's output, one at a time; such as {tokens: 128k}."""
    allow_partial: bool = False
    """Methods that set weights to zero: continue when less than 95% of the decoder's weights are in linears. The other weights are all
    kept."""

    def __post_init__(self) -> None:
        TrainingBlock.__post_init__(self)
        given = [name for name in self.exactly_one if getattr(self, name) is not None]
        if len(given) != 1:
            names = ", ".join(f"'{name}'" for name in self.exactly_one[:-1])
            raise ValueError(f"a prune stage needs exactly one of {names} and '{self.exactly_one[-1]}'; given: {given or 'none'}")
        trains = self.tokens is not None or self.steps is not None
        if self.movement is not None and not trains:
            raise ValueError("movement pruning scores weights by how training moves them; give 'tokens' or 'steps', such as tokens: 10M")
        rounds = self.structured is not None and self.structured.rounds is not None
        if rounds and not trains:
            raise ValueError("'structured.rounds' distils after each cut; give 'tokens' or 'steps', such as tokens: 30M")
        if trains and self.calibrates and not rounds:
            else_ = ", or cut in rounds with distillation (structured.rounds: 0.3)" if self.structured else ", which keeps the zeros"
            raise ValueError(f"{given[0]} pruning is one shot and takes no 'tokens' or 'steps'; add a distill stage after it{else_}")
        if self.local is not None and trains:
            raise ValueError("'local' distils a model that was pruned in one shot, and this stage trains already; leave 'local' out")
        if self.calibration_tokens is None:
            # the dataclass is frozen; the number stands in records and stage keys
            tokens = CALIBRATION_TOKENS if self.wanda or self.sparsegpt else 32_768
            object.__setattr__(self, "calibration_tokens", tokens)

    @property
    def method(self) -> str:
        """Name of the method."""
        return next(name for name in self.exactly_one if getattr(self, name) is not None)

    @property
    def weights(self) -> WeightSettings | None:
        """Settings of a method that sets single weights to zero; None for one that cuts the shape."""
        found = getattr(self, self.method)
        return found if isinstance(found, WeightSettings) else None

    @property
    def calibrates(self) -> bool:
        """Whether the method looks at calibration text."""
        return self.magnitude is None and self.movement is None
