"""Settings of a loss whose divergence the user wrote: a subclass for each, with its options as fields. Importable without torch."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..parts import Part
from .settings import Divergence, LossSettings


@dataclass(frozen=True, kw_only=True)
class OwnLossSettings(LossSettings):
    """Base of the settings that ``configs/own_settings.py`` makes for an imported divergence."""

    part: ClassVar[Part]
    """The divergence."""

    def own_options(self) -> dict[str, Any]:
        """The divergence's options by name."""
        return {name: getattr(self, name) for name in self.part.options}

    def _fill(self, dial: str, default: float, owners: tuple[Divergence, ...]) -> None:
        # an option may have the name of a built-in divergence's dial, such as alpha; then it is the user's
        if dial not in self.part.options:
            super()._fill(dial, default, owners)
