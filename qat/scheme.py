"""QuantScheme: which module of a model gets which QuantSpec. One spec for all linears, changes by name pattern, and modules to skip.

    QuantScheme(weights=QuantSpec(bits=4, group_size=64), skip=("*.0.*",), overrides={"*.down_proj": SpecChange(bits=8)})

Embedding and head are not quantized unless the scheme has a change for them, or a mixture. The module imports no torch: recipes are read
without it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from .. import check_fields
from .mixes import HEAD, MIXES, MixName, Shapes, mix_of_linears, mix_spec
from .spec import FLOAT_BITS, IMPLIED, TERNARY_BITS, Bits, Divisor, GroupSize, Kind, QuantSpec, ScaleGrid


@dataclass(frozen=True, kw_only=True)
class SpecChange:
    """How a quantization differs from the stage's ``weights``. A key that is not given is as in ``weights``."""

    kind: Kind | None = None
    """As in weights."""
    bits: Bits | None = None
    """As in weights. With another kind than int, the default is the width of that kind."""
    group_size: GroupSize | None = None
    """As in weights."""
    symmetric: bool | None = None
    """As in weights."""
    divisor: Divisor | None = None
    """As in weights."""
    scale_grid: ScaleGrid | None = None
    """As in weights."""
    ternary: bool | None = None
    """As in weights. A change of kind, bits or symmetric that ternary codes do not fit makes it false."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.given:
            raise ValueError(f"an empty section changes nothing; give one of {', '.join(f.name for f in fields(self))}, or leave it out")

    @property
    def given(self) -> dict[str, Any]:
        """The fields that are changed."""
        return {entry.name: value for entry in fields(self) if (value := getattr(self, entry.name)) is not None}

    def applied(self, spec: QuantSpec) -> QuantSpec:
        """``spec`` with the changes; ValueError if they do not fit together."""
        # a float kind has one width; a change that also gives bits keeps them, and QuantSpec judges the pair
        fixed = {"bits": FLOAT_BITS[self.kind], **IMPLIED.get(self.kind, {})} if self.kind in FLOAT_BITS else {}
        if self.ternary:
            fixed |= {"bits": TERNARY_BITS}
        elif spec.ternary and (self.kind or "int", self.bits or TERNARY_BITS, self.symmetric is not False) != ("int", TERNARY_BITS, True):
            fixed |= {"ternary": False}
        return replace(spec, **fixed | self.given)


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """The quantization specs of a model's modules. The order of the patterns has no influence.

    Raises:
        ValueError: a change does not fit ``weights``; the message begins with its key.
    """

    weights: QuantSpec = field(default_factory=QuantSpec)
    """Spec of every linear of the decoder layers that no field below names."""
    skip: tuple[str, ...] = ()
    """fnmatch patterns of full module names that are not quantized, even if ``overrides`` match them too."""
    overrides: Mapping[str, SpecChange] = field(default_factory=dict)
    """fnmatch pattern of full names of decoder linears -> changes to their spec."""
    embedding: SpecChange | None = None
    """Changes for the input embedding, and for the head of a tied model. None = not quantized."""
    head: SpecChange | None = None
    """Changes for the output head. None = not quantized."""
    mix: MixName | None = None
    """A mixture of llama.cpp in place of ``weights``, which then is the kind of most matrices; embedding and head are quantized too, unless
    ``skip`` names them."""

    def __post_init__(self) -> None:
        if self.mix and self.weights != QuantSpec(kind=MIXES[self.mix].most):
            raise ValueError(f"weights: a scheme with mix={self.mix!r} has weights of kind={MIXES[self.mix].most!r}")
        for key, change in self.changes().items():
            try:
                change.applied(self.weights)
            except ValueError as error:
                # the message begins with the key, by which a recipe finds the line
                raise ValueError(f"{key}: {error}") from None

    @classmethod
    def of(cls, spec: "QuantSpec | QuantScheme", skip: Sequence[str] = ()) -> "QuantScheme":
        """A scheme with one spec for all linears but ``skip``; a scheme is returned as it is."""
        return spec if isinstance(spec, QuantScheme) else cls(weights=spec, skip=tuple(skip))

    def changes(self) -> dict[str, SpecChange]:
        """Every change by its key in a recipe."""
        outer = {"embedding": self.embedding, "head": self.head}
        return {f"overrides.{name}": change for name, change in self.overrides.items()} | {k: v for k, v in outer.items() if v}

    def of_linears(self, shapes: Shapes) -> dict[str, QuantSpec]:
        """The spec of each decoder linear that is not skipped, in the order of ``shapes``.

        Args:
            shapes: (out, in) of all linears of the decoder layers by full name, in module order.

        Raises:
            ValueError: a pattern of ``overrides`` matches no linear, or two patterns change the same linear differently.
        """
        # skip goes first: a skipped linear has no spec for a pattern to change
        kept = [name for name in shapes if not self._skips(name)]
        usual = mix_of_linears(self.mix, shapes) if self.mix else dict.fromkeys(kept, self.weights)
        found: dict[str, tuple[str, QuantSpec]] = {}
        for pattern, change in self.overrides.items():
            matched = [name for name in kept if fnmatchcase(name, pattern)]
            if not matched:
                raise ValueError(f"overrides: {pattern!r} matches no linear layer that is quantized; {example_of(kept)}")
            # always from ``weights``, never from another pattern's result
            spec = change.applied(self.weights)
            for name in matched:
                # the first pattern sets the spec, and every later one must agree: the order of patterns has no influence
                other, before = found.setdefault(name, (pattern, spec))
                if before != spec:
                    raise ValueError(f"overrides: {other!r} and {pattern!r} both match {name} and differ; narrow one of the patterns")
        return {name: found[name][1] if name in found else usual[name] for name in kept}

    def of_ends(self, columns: int, embedding: str, head: str) -> dict[str, QuantSpec]:
        """The specs of embedding and head by these two words, as far as they are quantized.

        Args:
            columns: Hidden size, the width of both.
            embedding: Full name of the embedding.
            head: Full name of the head; '' where it is tied to the embedding.
        """
        # a tied table is multiplied by as a head
        usual: dict[str, Kind] = {} if self.mix is None else {"embedding": MIXES[self.mix].most if head else HEAD, "head": HEAD}
        found = {}
        for key, name in (("embedding", embedding), ("head", head)):
            change: SpecChange | None = getattr(self, key)
            if change is not None:
                found[key] = change.applied(self.weights)
            elif key in usual and name and not self._skips(name):
                found[key] = mix_spec(usual[key], columns)
        return found

    def _skips(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.skip)


def example_of(names: Iterable[str]) -> str:
    """A sentence for messages that shows how patterns are written."""
    example = next(iter(names), "model.layers.0.mlp.down_proj")
    return f"patterns are matched to full names such as {example!r}, so write '*.{example.rsplit('.', 1)[-1]}' for all of a kind."
