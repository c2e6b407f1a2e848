"""How remedies are written in a recipe: the overrides of its stages that follow them, such as ``stages.qat.weights.bits=4``."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...qat.export.limits.refusal import (
    Beyond,
    NarrowFfn,
    OneScheme,
    Option,
    OtherFormat,
    Phrase,
    Refusal,
    Remedy,
    Skip,
    Weights,
    Without,
)

if TYPE_CHECKING:
    from ...qat.scheme import QuantScheme
    from ...qat.spec import QuantSpec
    from .shapes import ModelShape


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
class RecipeRemedies:
    """The words for one export of a recipe; called with a remedy it is what ``refusal.Words`` asks for."""

    model: "ModelShape"
    """The exported model."""
    scheme: "QuantScheme"
    """Of its weights."""
    formats: tuple[str, ...]
    """What the export writes."""
    keys: Keys = USUAL_KEYS

    def __call__(self, remedy: Remedy, refusal: Refusal) -> Phrase | None:
        """(verb, what) of a remedy."""
        match remedy:
            case Weights(values):
                assert refusal.spec is not None
                return "use", self.weights(refusal.spec, [module.name for module in refusal.modules], **dict(values))
            case Beyond(key, values):
                return "use", " ".join(f"{self.keys.quantizer}{key}.{name}={value}" for name, value in values)
            case Without(key):
                return "leave", f"{self.keys.quantizer}{key} out"
            case Skip(patterns):
                return "use", self.skip(*patterns)
            case NarrowFfn(channels):
                return "use", self.ffn(channels)
            case OneScheme(names):
                return "let", f"{self.keys.quantizer}overrides name all of {', '.join(names)} alike, or none"
            case OtherFormat(name):
                return "use", self.other_format(name, instead_of=refusal.format)
            case Option("reader_version", value):
                return "name the version that will read it:", f"{self.keys.export}reader_version={value}"
            case Option(name, value):
                return "use", f"{self.keys.export}{name}={value} to have them rounded"

    def weights(self, spec: "QuantSpec", names: Iterable[str], **values: object) -> str:
        """The overrides that give modules of a quantization scheme other values; of ``overrides`` in words, as its pattern is no part of a
        key.

        Args:
            spec: What the modules have.
            names: Their full names.
            values: Fields of the QuantSpec.
        """
        text = {name: str(value).lower() if isinstance(value, bool) else value for name, value in values.items()}
        kinds = list(dict.fromkeys(self.model.kind_of(name) for name in names))
        ends = {self.model.embedding: "embedding", self.model.head: "head"}
        sections = ["weights"] if spec == self.scheme.weights else [ends[kind] for kind in kinds if kind in ends]
        if sections == ["weights"] or len(sections) == len(kinds):
            return " ".join(f"{self.keys.quantizer}{section}.{name}={value}" for section in sections for name, value in text.items())
        return (
            f"{{{', '.join(f'{name}: {value}' for name, value in text.items())}}} in {self.keys.quantizer}overrides for {', '.join(kinds)}"
        )

    def skip(self, *patterns: str) -> str:
        """The override that leaves out more linears."""
        return f"{self.keys.quantizer}skip=[{','.join(dict.fromkeys((*self.scheme.skip, *patterns)))}]"

    def ffn(self, channels: int) -> str:
        """The override that keeps so many FFN channels."""
        if self.keys.prune is None:
            return f"a stage before it: prune: {{structured: {{ffn: {channels}}}}}"
        return f"{self.keys.prune}structured.ffn={channels}"

    def other_format(self, name: str, *, instead_of: str = "") -> str:
        """The override that writes another format too, or in place of one."""
        kept = [form for form in self.formats if form not in (instead_of, name)]
        return f"{self.keys.export}formats=[{','.join([*kept, name])}]"
