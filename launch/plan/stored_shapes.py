"""The matrices that serving stacks have to load: one case for each quantization scheme of a model's linears, from shapes alone."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...models.families import text_config
from ...models.fused_linears import FUSED
from ...qat.export.limits.shared import multiple_near

if TYPE_CHECKING:
    from ...qat.spec import ActivationSpec, QuantSpec
    from .recipe_remedies import RecipeRemedies
    from .shapes import ModelShape


@dataclass(frozen=True)
class PartlyLeft:
    """A matrix that servers fuse from several linears, some of which are not quantized."""

    names: tuple[str, ...]
    """The linears that are fused."""
    left: tuple[str, ...]
    """Those of them that are not quantized."""


@dataclass(frozen=True)
class StoredShapes:
    """One quantization scheme of an export, and the matrices that have it."""

    remedies: "RecipeRemedies"
    """The export's remedies, which name the model."""
    own: "QuantSpec"
    """The scheme in the recipe."""
    spec: "QuantSpec"
    """The scheme as served: one scale per matrix becomes one per row."""
    linears: dict[str, tuple[int, int]]
    """(out, in) of each kind of linear with this scheme, such as ``mlp.down_proj``, from the first layer that has it."""
    ranks: int = 1
    """GPUs of tensor parallelism."""
    partly: "PartlyLeft | None" = None
    """The first fused matrix that is only partly quantized; None if there is none."""
    activations: "ActivationSpec | None" = None
    """How inputs are rounded."""
    kv_cache: "ActivationSpec | None" = None
    """How keys and values are rounded."""

    @property
    def model(self) -> "ModelShape":
        """The exported model."""
        return self.remedies.model

    @property
    def config(self) -> Any:
        """The config of the language model."""
        return text_config(self.model.config)

    def spec_fix(self, **values: object) -> str:
        """Return the overrides that give the scheme other values."""
        return self.remedies.weights(self.own, self.linears, **values)

    def ffn_fix(self, unit: int) -> str:
        """Return the override that prunes to a number of FFN channels that fits; '' if channels of the family cannot be pruned."""
        if self.model.family.refusal("prune channels"):
            return ""
        return self.remedies.ffn(multiple_near(self.model.dimensions.ffn, unit))


def stored_shapes(
    remedies: "RecipeRemedies", ranks: int = 1, activations: "ActivationSpec | None" = None, kv_cache: "ActivationSpec | None" = None
) -> list[StoredShapes]:
    """Return a case for each quantization scheme of the decoder's linears, the most frequent first.

    Args:
        remedies: The export's remedies, which name the model and its scheme.
        ranks: GPUs that serve one copy.
        activations: How inputs are rounded.
        kv_cache: How keys and values are rounded.
    """
    model = remedies.model
    specs = remedies.scheme.of_linears(model.linears)
    found = []
    for spec, _ in Counter(specs.values()).most_common():
        linears: dict[str, tuple[int, int]] = {}
        for name, other in specs.items():
            if other == spec:
                # layers are alike in shape, so the first stands for all
                linears.setdefault(model.kind_of(name), model.linears[name])
        # exporters repeat a matrix's one scale for each row, which gives the same weights
        served = replace(spec, group_size="channel") if spec.group_size == "tensor" else spec
        found.append(StoredShapes(remedies, spec, served, linears, ranks, _partly_left(specs), activations, kv_cache))
    return found


def _partly_left(specs: "Mapping[str, QuantSpec]") -> PartlyLeft | None:
    """Return the first fused matrix of servers that is only partly quantized."""
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in specs):
        for names in FUSED:
            left = tuple(name for name in names if f"{parent}.{name}" not in specs)
            # q, k, v are not in an MLP
            if left and len(left) < len(names):
                return PartlyLeft(names, left)
    return None
