"""Why a format cannot hold a model, and the remedies, as plain values: the plan and the exporter each phrase them for their users."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ...spec import QuantSpec
    from .stored_model import StoredModule


@dataclass(frozen=True)
class Weights:
    """Quantize the weights of the refusal's modules differently."""

    values: tuple[tuple[str, object], ...]
    """(field of the QuantSpec, value)."""


@dataclass(frozen=True)
class Beyond:
    """Round inputs, or keys and values, differently."""

    key: Literal["activations", "kv_cache"]
    values: tuple[tuple[str, object], ...]
    """(field of the ActivationSpec, value)."""


@dataclass(frozen=True)
class Without:
    """Leave out a setting of the quantizing stage."""

    key: Literal["embedding", "head", "activations", "kv_cache"]


@dataclass(frozen=True)
class Skip:
    """Leave modules unquantized."""

    patterns: tuple[str, ...]
    """fnmatch patterns of full names."""


@dataclass(frozen=True)
class NarrowFfn:
    """Prune the FFN to this number of channels."""

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


def yaml_word(value: object) -> str:
    """Return a setting's value as a recipe writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


Remedy = Weights | Beyond | Without | Skip | NarrowFfn | OneScheme | OtherFormat | Option


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """One thing that a format cannot hold."""

    reason: str
    """The end of a sentence that begins with the format's name: 'packs 4 bits, not 8'."""
    remedies: tuple[Remedy, ...] = ()
    """Each one alone is sufficient; the smallest change comes first."""
    modules: tuple["StoredModule", ...] = ()
    """The modules concerned; () if the whole model is."""
    spec: "QuantSpec | None" = None
    """Quantization scheme of the modules, if the scheme is the cause."""
    format: str = ""
    """Name of the format; ``formats.refusals`` fills it in."""
    by_values: bool = False
    """The stored values decide, and they hardly ever fit. The plan has no values and refuses; the exporter checks the values."""


def weights(**values: object) -> Weights:
    """Return ``Weights`` of keyword arguments."""
    return Weights(tuple(values.items()))


Phrase = tuple[str, str]
"""(verb, what): ('use', 'weights.bits=4')."""
Words = Callable[[Remedy, Refusal], Phrase | None]
"""Phrases a remedy; None if the user has no such option."""


def said(phrases: Iterable[Phrase]) -> str:
    """Join phrases: 'use a, or b, or leave c out'. A repeated verb is written once."""
    parts: list[str] = []
    before = ""
    for verb, what in phrases:
        parts.append(what if verb == before else f"{verb} {what}")
        before = verb
    return ", or ".join(parts)


def sentence(refusal: Refusal, words: Words, more: str = "") -> str:
    """Return the refusal as a sentence: 'awq packs 4 bits, not 8; use weights.bits=4'.

    Args:
        refusal: The refusal.
        words: Phrases a remedy.
        more: Text after the reason, for example the module in brackets.
    """
    # a command line and a recipe have different options, so some remedies have no phrase
    phrases = [phrase for remedy in refusal.remedies if (phrase := words(remedy, refusal))]
    return f"{refusal.format} {refusal.reason}{more}" + (f"; {said(phrases)}" if phrases else "")


def listed(values: Sequence[object]) -> str:
    """Join values: '2, 4 and 8'."""
    *most, last = map(str, values)
    return f"{', '.join(most)} and {last}" if most else last
