"""What is to be exported, as the limits of formats see it: shapes and quantization schemes, no weights.

The plan makes it of a recipe before anything is trained, an exporter of the folder that it has opened.
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
        """What it is called in every decoder layer, such as ``mlp.down_proj``; outside the layers its full name."""
        found = _IN_LAYER.fullmatch(self.name)
        return found[1] if found else self.name

    @property
    def group(self) -> int | None:
        """Inputs that share a scale; None: at least the whole row."""
        return None if isinstance(self.spec.group_size, str) else self.spec.group_size


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model that a format is asked to hold."""

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
    """How inputs of the quantized linears are rounded; None = not at all."""
    kv_cache: "ActivationSpec | None" = None
    """How keys and values are rounded; None = not at all."""
    reader_version: str | None = None
    """Version of the format's package that will read the export, where layouts differ and the user names one."""
    allow_inexact: bool = False
    """Plain weights may be rounded."""
    ffn: int | None = None
    """FFN channels of a decoder layer where decoct can remove some of them; None where it cannot."""

    @classmethod
    def of_weights(cls, spec: "QuantSpec", size: int = 4096) -> "StoredModel":
        """One square matrix: asks what a format makes of a quantization scheme alone, apart from any model's shapes and family.

        Args:
            spec: The scheme.
            size: Outputs and inputs.
        """
        return cls(modules=(StoredModule(name="weight", spec=spec, rows=size, columns=size),), config=None)

    def schemes(self) -> list[tuple["QuantSpec", tuple[StoredModule, ...]]]:
        """Each quantization scheme with its modules, that of most modules first."""
        counted = Counter(module.spec for module in self.modules)
        return [(spec, tuple(module for module in self.modules if module.spec == spec)) for spec, _ in counted.most_common()]
