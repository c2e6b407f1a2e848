"""What serving stacks and formats are asked to hold: one case for each lattice of a model, from its shape alone."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...models.families import FUSED, text_config

if TYPE_CHECKING:
    from ...qat.scheme import QuantScheme
    from ...qat.spec import ActivationSpec, QuantSpec
    from .shapes import ModelShape


@dataclass(frozen=True)
class Apart:
    """What is one matrix in servers and has not one lattice here."""

    names: tuple[str, ...]
    """Its parts."""
    left: tuple[str, ...]
    """Those that are not quantized."""


@dataclass(frozen=True)
class Keys:
    """Where a remedy is written in a recipe: how the keys of its overrides begin."""

    quantizer: str = ""
    """Of the stage that rounded the weights, such as ``stages.qat.``."""
    export: str = "export."
    """Of the export."""
    prune: str | None = "prune."
    """Of the stage that removes FFN channels; None where none does."""


USUAL_KEYS = Keys()


@dataclass(frozen=True)
class StoredShapes:
    """What a target is asked to hold: one lattice of an export, and the matrices that have it."""

    model: "ModelShape"
    spec: "QuantSpec"
    linears: dict[str, tuple[int, int]]
    """(out, in) of the kinds of linears in a layer that have the lattice, such as ``mlp.down_proj``; of the first layer that has each."""
    ranks: int = 1
    """GPUs of tensor parallelism."""
    formats: Sequence[str] = ("compressed-tensors",)
    """What is exported."""
    apart: "Apart | None" = None
    """Linears of one layer that servers make one matrix of, with different lattices."""
    ends: tuple[str, ...] = ()
    """Which of embedding and head are quantized."""
    activations: "ActivationSpec | None" = None
    """How inputs are rounded."""
    kv_cache: "ActivationSpec | None" = None
    """How keys and values are."""
    keys: Keys = USUAL_KEYS
    usual: bool = True
    """Whether the lattice is that of ``weights``, and not of an override."""
    skip: tuple[str, ...] = ()
    """Patterns of the linears that are left out."""

    @property
    def config(self) -> Any:
        """Of the language model."""
        return text_config(self.model.config)

    def spec_fix(self, **values: object) -> str:
        """The overrides that give the lattice other values; of an override in words, as its pattern is no part of a key."""
        if self.usual:
            return " ".join(f"{self.keys.quantizer}weights.{name}={value}" for name, value in values.items())
        said = ", ".join(f"{name}: {value}" for name, value in values.items())
        return f"{{{said}}} in {self.keys.quantizer}overrides for {', '.join(self.linears)}"

    def skip_fix(self, *patterns: str) -> str:
        """The override that leaves out more linears."""
        return f"{self.keys.quantizer}skip=[{','.join(dict.fromkeys((*self.skip, *patterns)))}]"

    def ffn_fix(self, unit: int) -> str:
        """FFN channels that fit, as the stage that keeps so many: the next multiple below, or above where there is none; '' where no stage
        prunes the family's channels."""
        if self.model.family.refusal("prune channels"):
            return ""
        ffn = self.model.dimensions.ffn
        wanted = max(unit, ffn // unit * unit)
        if self.keys.prune is None:
            return f"a stage before it: prune: {{structured: {{ffn: {wanted}}}}}"
        return f"{self.keys.prune}structured.ffn={wanted}"

    def formats_fix(self, *, add: str, instead_of: str = "") -> str:
        """The override that writes another format too, or in place of one."""
        kept = [form for form in self.formats if form not in (instead_of, add)]
        return f"{self.keys.export}formats=[{','.join([*kept, add])}]"


def stored_shapes(
    model: "ModelShape",
    scheme: "QuantScheme",
    ranks: int,
    formats: Sequence[str],
    activations: "ActivationSpec | None" = None,
    kv_cache: "ActivationSpec | None" = None,
    keys: Keys = USUAL_KEYS,
) -> list[StoredShapes]:
    """A case for each lattice of the decoder's linears, that of most modules first; one scale for a matrix is served as one a row."""
    specs = scheme.of_linears(model.linears)
    ends = tuple(key for key in ("embedding", "head") if getattr(scheme, key) is not None)
    found = []
    for spec, _ in Counter(specs.values()).most_common():
        linears: dict[str, tuple[int, int]] = {}
        for name, other in specs.items():
            if other == spec:
                linears.setdefault(model.kind_of(name), model.linears[name])
        served = replace(spec, group_size="channel") if spec.group_size == "tensor" else spec
        more = (keys, spec == scheme.weights, tuple(scheme.skip))
        found.append(StoredShapes(model, served, linears, ranks, tuple(formats), _apart(specs), ends, activations, kv_cache, *more))
    return found


def _apart(specs: "Mapping[str, QuantSpec]") -> Apart | None:
    """The first matrix of servers whose parts have different lattices."""
    parents = dict.fromkeys(name.rpartition(".")[0] for name in specs)
    for parent, names in ((parent, names) for parent in parents for names in FUSED):
        own = [specs.get(f"{parent}.{name}") for name in names]
        # q, k, v are not in an MLP
        if any(own) and len(set(own)) > 1:
            return Apart(names, tuple(name for name, spec in zip(names, own) if spec is None))
    return None
