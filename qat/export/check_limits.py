"""Checks of an opened folder against the limits of an export format."""

from typing import Any

from ...models.common.errors import UserError
from ...models.families import FAMILIES, text_config
from ...models.folder.model_folder import read_record
from ...models.folder.structure import plain_config
from ...models.sizes import sizes_of
from ..source.quantized_source import ExportSource
from ..spec import ActivationSpec
from .limits.formats import refusals
from .limits.refusal import (
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
    sentence,
    yaml_word,
)
from .limits.stored_model import StoredModel, StoredModule

_OPTIONS = {
    "reader_version": ("name the version of compressed-tensors that will read it:", "--reader-version {value}"),
    "allow_inexact": ("have them rounded:", "--allow-inexact"),
}


def check_limits(source: ExportSource, format: str) -> None:
    """Refuse what the format cannot hold; limits that depend on stored values are left to its exporter.

    Args:
        source: The opened folder.
        format: Name of the format.

    Raises:
        UserError: the format cannot hold the model; names the module and the nearest setting that can be stored.
    """
    # every reason at once, so that one change of the settings can answer all of them
    found = [_said(refusal) for refusal in refusals(format, opened_model(source)) if not refusal.by_values]
    if len(found) == 1:
        raise UserError(found[0])
    if found:
        raise UserError(f"{source.folder} cannot be exported in this form:\n" + "\n".join(f"  - {said}" for said in found))


def opened_model(source: ExportSource) -> StoredModel:
    """Describe an opened folder for the limits of formats."""
    state, config = source.state, plain_config(source.folder)
    return StoredModel(
        modules=tuple(_module(source, name) for name in state.modules),
        config=config,
        # tied tensors are stored once, so limits see them once
        tensors=tuple(name for name in source.structure.shapes if name not in source.structure.tied),
        embedding=source.structure.embedding,
        head=source.structure.head,
        tied=f"{source.structure.head}.weight" in source.structure.tied,
        activations=state.activations or _recorded(source, "activations"),
        kv_cache=state.cache.spec if state.cache else _recorded(source, "kv_cache"),
        reader_version=source.reader_version,
        ffn=_ffn(config),
    )


def _module(source: ExportSource, name: str) -> StoredModule:
    rows, columns = source.state.codes[name].shape
    return StoredModule(name=name, spec=source.state.spec_of(name), rows=rows, columns=columns)


def _recorded(source: ExportSource, key: str) -> ActivationSpec | None:
    """Return the recorded spec of a quantized folder that is exported with plain weights."""
    # a quantized source states its specs itself; a plain source has them only in the record it was made with
    quant = {} if source.state.modules else read_record(source.folder).get("quant") or {}
    return ActivationSpec.from_json(quant[key]) if quant.get(key) else None


def _ffn(config: Any) -> int | None:
    # only families that decoct can prune get the remedy of a narrower FFN
    family = FAMILIES.get(config.model_type)
    return None if family is None else sizes_of(text_config(config), family).ffn


def _said(refusal: Refusal) -> str:
    modules = refusal.modules
    more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
    return sentence(refusal, export_words, f" ({modules[0].name}{more})" if modules else "")


def export_words(remedy: Remedy, refusal: Refusal) -> Phrase | None:
    """Phrase a remedy for the user of a quantized folder: an earlier step to change, or an option to give."""
    match remedy:
        case Weights(values):
            return "quantize with", ", ".join(f"{name}={_plain(value)}" for name, value in values)
        case Beyond(key, values):
            return "quantize with", f"{key}: {{{', '.join(f'{name}: {yaml_word(value)}' for name, value in values)}}}"
        case Skip(patterns):
            return "quantize with", f"skip: {list(patterns)}"
        case Without(key):
            return "leave", f"{key!r} out"
        case NarrowFfn(channels):
            return "prune with", f"structured.ffn={channels}"
        case OneScheme(names):
            return "give", f"all of {', '.join(names)} the same scheme, or none"
        case OtherFormat(name):
            return "export to", name
        case Option(name, value):
            verb, what = _OPTIONS[name]
            return verb, what.format(value=value)


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
