"""Why a format cannot hold a model, and what to change: plain values, which a recipe's plan and an exporter put into their own words."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ...spec import QuantSpec
    from .stored_model import StoredModule


@dataclass(frozen=True)
class Weights:
    """Quantize the weights of the refusal's modules otherwise."""

    values: tuple[tuple[str, object], ...]
    """(field of the QuantSpec, value)."""


@dataclass(frozen=True)
class Beyond:
    """Round inputs, or keys and values, otherwise."""

    key: Literal["activations", "kv_cache"]
    values: tuple[tuple[str, object], ...]
    """(field of the ActivationSpec, value)."""


@dataclass(frozen=True)
class Without:
    """Leave a setting of the quantizing stage out."""

    key: Literal["embedding", "head", "activations", "kv_cache"]


@dataclass(frozen=True)
class Skip:
    """Leave modules unquantized."""

    patterns: tuple[str, ...]
    """fnmatch patterns of full names."""


@dataclass(frozen=True)
class NarrowFfn:
    """Prune the FFN to so many channels."""

    channels: int


@dataclass(frozen=True)
class OneScheme:
    """Give these linears of a block the same quantization scheme."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class OtherFormat:
    """Write another format instead."""

    name: str


@dataclass(frozen=True)
class Option:
    """Set an option of the export."""

    name: Literal["reader_version", "allow_inexact"]
    value: str


Remedy = Weights | Beyond | Without | Skip | NarrowFfn | OneScheme | OtherFormat | Option


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """One thing that a format cannot hold."""

    reason: str
    """The end of a sentence that begins with the format's name: 'packs 4 bits, not 8'."""
    remedies: tuple[Remedy, ...] = ()
    """Each alone makes it go away, the nearest first."""
    modules: tuple["StoredModule", ...] = ()
    """The modules that it is about; () where it is about the whole model."""
    spec: "QuantSpec | None" = None
    """Their quantization scheme, where that is what cannot be held."""
    format: str = ""
    """Name of the format; ``formats.refusals`` fills it in."""
    by_values: bool = False
    """The stored values decide, and hardly ever fit. The plan, which has none, refuses; the exporter looks at them."""


def weights(**values: object) -> Weights:
    """``Weights`` of keyword arguments."""
    return Weights(tuple(values.items()))


Phrase = tuple[str, str]
"""(verb, what): ('use', 'weights.bits=4')."""
Words = Callable[[Remedy, Refusal], Phrase | None]
"""How a remedy is said; None where it is no way for the one who is told."""


def said(phrases: Iterable[Phrase]) -> str:
    """'use a, or b, or leave c out': a verb that repeats is said once."""
    parts: list[str] = []
    before = ""
    for verb, what in phrases:
        parts.append(what if verb == before else f"{verb} {what}")
        before = verb
    return ", or ".join(parts)


def sentence(refusal: Refusal, words: Words, more: str = "") -> str:
    """'awq packs 4 bits, not 8; use weights.bits=4'.

    Args:
        refusal: What is refused.
        words: How remedies are said.
        more: Follows the reason, such as the module in brackets.
    """
    phrases = [phrase for remedy in refusal.remedies if (phrase := words(remedy, refusal))]
    return f"{refusal.format} {refusal.reason}{more}" + (f"; {said(phrases)}" if phrases else "")


def listed(values: Sequence[object]) -> str:
    """'2, 4 and 8'."""
    *most, last = map(str, values)
    return f"{', '.join(most)} and {last}" if most else last
