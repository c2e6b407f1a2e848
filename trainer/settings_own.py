"""Settings of the user's own stages and callbacks: a subclass for each, with its options as fields (``configs/own_settings.py``)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from .. import check_fields
from ..parts import Part


@dataclass(frozen=True, kw_only=True)
class OwnSettings:
    """Base of settings that carry the part which they are for."""

    part: ClassVar[Part]
    """The part."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.part.settings is not None:
            # the user's dataclass has checks of its own
            self.part.settings(**self.own_options())

    def own_options(self) -> dict[str, Any]:
        """The part's options by name."""
        return {name: getattr(self, name) for name in self.part.options}


@dataclass(frozen=True, kw_only=True)
class OwnStageSettings(OwnSettings):
    """Settings of a stage that the recipe imports."""


@dataclass(frozen=True, kw_only=True)
class CallbackSettings:
    """A callback that the recipe imports. ``callbacks: [mine]`` is short for ``callbacks: [{name: mine}]``; its options stand beside the
    name."""

    name: str
    """Name of the callback, as the imported file registers it."""

    def __post_init__(self) -> None:
        if not isinstance(self, OwnSettings):
            raise ValueError(
                f"name={self.name!r} is no callback that the recipe imports; name the file that registers it (import: FILE.py)"
            )


@dataclass(frozen=True, kw_only=True)
class OwnCallbackSettings(OwnSettings, CallbackSettings):
    """Settings of a callback that the recipe imports."""

    def __post_init__(self) -> None:
        OwnSettings.__post_init__(self)
