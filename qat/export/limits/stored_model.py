"""Description of a model to export for the limits of formats: shapes and quantization schemes, no weights.

The plan derives it from a recipe before training, an exporter from the opened folder.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...spec import ActivationSpec, QuantSpec

_IN_LAYER = re.compile(r".*?\.\d+\.(.+)")


@dataclass(frozen=True, kw_only=True)
class StoredModule:
    """A quantized matrix."""

    name: str
    """Full name."""
    spec: "QuantSpec"
    rows: int
    """Outputs."""
    columns: int
    """Inputs."""

    @property
    def kind(self) -> str:
        """Name within a decoder layer, for example ``mlp.down_proj``; the full name for modules outside the layers."""
        # up to the first number, which is that of the layer
        found = _IN_LAYER.fullmatch(self.name)
        return found[1] if found else self.name

    @property
    def group(self) -> int | None:
        """Input features per scale; None if a scale covers at least a whole row."""
        return None if isinstance(self.spec.group_size, str) else self.spec.group_size


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model to store in a format."""

    modules: tuple[StoredModule, ...]
    """Every quantized matrix, in module order."""
    config: Any
    """The transformers config."""
    tensors: tuple[str, ...] = ()
    """Names of all weights, tied ones once."""
    embedding: str = ""
    """Name of the input embedding's module."""
    head: str = ""
    """Name of the output head's module."""
    tied: bool = False
    """The head multiplies by the embedding's table."""
    activations: "ActivationSpec | None" = None
    """How inputs of the quantized linears are rounded; None if they are not."""
    kv_cache: "ActivationSpec | None" = None
    """How keys and values are rounded; None if they are not."""
    reader_version: str | None = None
    """Version of the format's package that will read the export; needed where layouts differ between versions."""
    allow_inexact: bool = False
    """Plain weights may be rounded."""
    ffn: int | None = None
    """FFN channels per decoder layer if decoct can prune them; None if it cannot."""

    @classmethod
    def of_weights(cls, spec: "QuantSpec", size: int = 4096) -> "StoredModel":
        """Return a model of one square matrix, to test a scheme without a model's shapes and family.

        Args:
            spec: The scheme.
            size: Number of outputs and of inputs.
        """
        return cls(modules=(StoredModule(name="weight", spec=spec, rows=size, columns=size),), config=None)

    def schemes(self) -> list[tuple["QuantSpec", tuple[StoredModule, ...]]]:
        """Return each quantization scheme with its modules, the most frequent scheme first."""
        # specs are frozen dataclasses: equal ones count together
        counted = Counter(module.spec for module in self.modules)
        return [(spec, tuple(module for module in self.modules if module.spec == spec)) for spec, _ in counted.most_common()]
