"""Settings of structured pruning: what is kept of each axis of the model."""

from dataclasses import dataclass

from .. import Count, check_fields


@dataclass(frozen=True, kw_only=True)
class StructuredSettings:
    """Remove whole channels, so that the dense model is smaller. Numbers state what is kept."""

    ffn: Count
    """FFN channels kept in every layer."""

    def __post_init__(self) -> None:
        check_fields(self)
