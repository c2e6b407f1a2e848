"""Phrases remedies as overrides of a recipe, such as ``stages.qat.weights.bits=4``."""

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
    yaml_word,
)

if TYPE_CHECKING:
    from ...qat.scheme import QuantScheme
    from ...qat.spec import QuantSpec
    from .shapes import ModelShape


@dataclass(frozen=True)
class Keys:
    """Key prefixes of the overrides that apply a remedy."""

    quantizer: str = ""
    """Prefix of the stage that rounded the weights, such as ``stages.qat.``."""
    export: str = "export."
    """Prefix of the export stage."""
    prune: str | None = "prune."
    """Prefix of the stage that removes FFN channels; None without such a stage."""


USUAL_KEYS = Keys()


@dataclass(frozen=True)
class RecipeRemedies:
    """Phrases remedies for one export of a recipe; a ``refusal.Words``."""

    model: "ModelShape"
    """The exported model."""
    scheme: "QuantScheme"
    """The scheme of its weights."""
    formats: tuple[str, ...]
    """The formats that the export writes."""
    keys: Keys = USUAL_KEYS
    refused: frozenset[str] = frozenset()
    """Those of ``formats`` that cannot hold the model; a remedy that names another format leaves all of them out."""

    def __call__(self, remedy: Remedy, refusal: Refusal) -> Phrase | None:
        """Return (verb, what) of a remedy."""
        match remedy:
            case Weights(values):
                assert refusal.spec is not None
                return "use", self.weights(refusal.spec, [module.name for module in refusal.modules], **dict(values))
            case Beyond(key, values):
                return "use", " ".join(f"{self.keys.quantizer}{key}.{name}={yaml_word(value)}" for name, value in values)
            case Without(key):
                # a mixture quantizes embedding and head without a key of their own
                by_mix = self.scheme.mix and key in ("embedding", "head") and getattr(self.scheme, key) is None
                return "leave", f"{self.keys.quantizer}{'mix' if by_mix else key} out"
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
        """Return the overrides that change the scheme of modules; entries of ``overrides`` in words, because the pattern that
        the recipe has for them is not known here.

        Args:
            spec: Current scheme of the modules.
            names: Full names of the modules.
            values: Fields of the QuantSpec.
        """
        text = {name: yaml_word(value) for name, value in values.items()}
        kinds = list(dict.fromkeys(self.model.kind_of(name) for name in names))
        ends = {self.model.embedding: "embedding", self.model.head: "head"}
        # modules with the common scheme are changed at ``weights``; embedding and head have keys of their own
        sections = ["weights"] if spec == self.scheme.weights else [ends[kind] for kind in kinds if kind in ends]
        if sections == ["weights"] or len(sections) == len(kinds):
            given = " ".join(f"{self.keys.quantizer}{section}.{name}={value}" for section in sections for name, value in text.items())
            # a mixture decides ``weights``, so both cannot be given
            return f"{given} in place of {self.keys.quantizer}mix" if self.scheme.mix and sections == ["weights"] else given
        return (
            f"{{{', '.join(f'{name}: {value}' for name, value in text.items())}}} in {self.keys.quantizer}overrides for {', '.join(kinds)}"
        )

    def skip(self, *patterns: str) -> str:
        """Return the override that skips further linears."""
        # an override replaces the whole list, so it repeats what is skipped already
        return f"{self.keys.quantizer}skip=[{','.join(dict.fromkeys((*self.scheme.skip, *patterns)))}]"

    def ffn(self, channels: int) -> str:
        """Return the override that keeps this number of FFN channels."""
        # no such stage to change: the remedy is a new one
        if self.keys.prune is None:
            return f"a stage before it: prune: {{structured: {{ffn: {channels}}}}}"
        return f"{self.keys.prune}structured.ffn={channels}"

    def other_format(self, name: str, *, instead_of: str = "") -> str:
        """Return the override that adds a format, or replaces one."""
        # an override replaces the whole list, so the other formats stand in it too
        kept = [form for form in self.formats if form not in (instead_of, name, *self.refused)]
        return f"{self.keys.export}formats=[{','.join([*kept, name])}]"
