"""What a transform gets: the model, what will be rounded, and how it says what it did."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from ...models.axis_map import Family
from ...models.calibration.replay import Replay
from ..spec import QuantSpec
from .settings import TransformSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class TransformCase:
    """A model that is about to be rounded."""

    model: "PreTrainedModel"
    family: Family
    settings: TransformSettings
    specs: Mapping[str, QuantSpec]
    """Spec of every module that will be rounded, by full name."""
    sparse: frozenset[str]
    """Modules whose exact zeros are a pruning mask."""
    seed: int

    def rounded(self, index: int, readers: tuple[str, ...]) -> dict[str, str]:
        """Full name -> name inside the layer of those of ``readers`` that will be rounded."""
        names = {f"{self.family.layers_path}.{index}.{reader}": reader for reader in readers}
        return {name: reader for name, reader in names.items() if name in self.specs}

    def mask(self, name: str, weight: Tensor) -> Tensor | None:
        """bool in the shape of ``weight``, True where it is kept; None where nothing is pruned."""
        return weight != 0 if name in self.sparse else None


class LayerTransform(Protocol):
    """A transform at work. Weights are fp32 and are changed in place."""

    def outside(self) -> None:
        """Changes what is outside the decoder layers, before the first of them."""
        ...

    def layer(self, index: int, layer: nn.Module, replay: Replay | None, advance: Callable[[int], None]) -> None:
        """Changes a decoder layer, which has its unrounded weights. A transform that calibrates runs it over the text once."""
        ...

    def record(self) -> dict[str, Any]:
        """What was done, as plain data for decoct.json."""
        ...
