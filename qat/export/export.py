"""Exporters: they pack a quantized folder for serving stacks and check the result before it gets its final name.

``export_folder`` does what all formats share; each format has a module of its own, registered in ``EXPORTERS``.
"""

import difflib
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.common.errors import DecoctError, UserError
from ...models.common.files import atomic_directory, check_free_space, write_json_atomic
from ...models.folder.import_card import origin_words
from ...models.folder.loading import TOKENIZER_FILES
from ...models.folder.older_readers import mend_tokenizer_config, with_older_fields
from ...models.folder.record import check_record, write_record
from ...models.folder.stored_names import left_out_words
from ..export import awq, bitsandbytes, gptq
from ..export import plain_safetensors as safetensors_folder
from ..footprint import folder_bytes
from ..runtimes.check import check_runtimes
from ..runtimes.transformers_process import needs_dequantizing
from ..source.openers import PLAIN_GGUF, SourceFolder
from ..source.plain_source import CastError, PlainSource
from ..source.quantized_source import ExportSource
from ..verify.exactness import Proof, prove
from ..verify.structure import structure_problems
from .card import CardFacts, FormatCard, card_text, said_of
from .check_limits import check_limits
from .compressed_tensors import writer as compressed_tensors
from .format_cards import AWQ_CARD, BITSANDBYTES_CARD, GPTQ_CARD, GPTQ_V2_CARD, PLAIN_CARD
from .gguf import writer as gguf_files
from .gguf.blocks import PREFERRED
from .gguf.card import GGUF_CARD
from .limits import plain

if TYPE_CHECKING:
    from torch import Tensor

_HOLDS_ALL = {
    "safetensors": "--format safetensors-f32 holds every weight (in a recipe stages.export.formats=[safetensors-f32]); or have them "
    "rounded: --allow-inexact (in a recipe stages.export.allow_inexact=true)",
    "gguf": "--format gguf-f32 holds every weight; or have them rounded: --allow-inexact",
}
"""Kind of format -> remedy if its dtype does not hold plain weights exactly."""
# Tokenizer files of any transformers version, and generation settings; the export writes its own weights and record.
_COPIED = (
    *TOKENIZER_FILES, "*.tiktoken", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Exporter:
    """One format."""

    planned_bytes: Callable[[ExportSource], int]
    config: Callable[[ExportSource], dict[str, Any]]
    """The content of config.json."""
    write: Callable[[Path, ExportSource], None]
    """Writes the weight files into a folder."""
    check_values: Callable[[ExportSource], None] | None = None
    """Raises UserError if the format cannot hold stored values of a model within its limits; None: ``write`` checks them."""
    card: FormatCard = field(default_factory=FormatCard)
    """The parts of the model card that depend on the format."""


_GGUF = Exporter(
    planned_bytes=gguf_files.planned_bytes,
    config=gguf_files.exported_config,
    write=gguf_files.write,
    card=GGUF_CARD,
)
_PLAIN = Exporter(
    planned_bytes=safetensors_folder.planned_bytes,
    config=safetensors_folder.exported_config,
    write=safetensors_folder.write,
    card=PLAIN_CARD,
)
EXPORTERS: dict[str, Exporter] = {
    compressed_tensors.NAME: Exporter(
        check_values=compressed_tensors.check_values,
        planned_bytes=compressed_tensors.planned_bytes,
        config=compressed_tensors.exported_config,
        write=compressed_tensors.write,
    ),
    gptq.V1: Exporter(
        planned_bytes=gptq.planned_bytes,
        config=partial(gptq.exported_config, format=gptq.V1),
        write=partial(gptq.write, format=gptq.V1),
        card=GPTQ_CARD,
    ),
    gptq.V2: Exporter(
        planned_bytes=gptq.planned_bytes,
        config=partial(gptq.exported_config, format=gptq.V2),
        write=partial(gptq.write, format=gptq.V2),
        card=GPTQ_V2_CARD,
    ),
    awq.NAME: Exporter(planned_bytes=awq.planned_bytes, config=awq.exported_config, write=awq.write, card=AWQ_CARD),
    bitsandbytes.NAME: Exporter(
        check_values=bitsandbytes.check_values,
        planned_bytes=bitsandbytes.planned_bytes,
        config=bitsandbytes.exported_config,
        write=bitsandbytes.write,
        card=BITSANDBYTES_CARD,
    ),
    plain.NAME: _PLAIN,
    plain.WIDE_NAME: _PLAIN,
    gguf_files.NAME: _GGUF,
    **{
        name: replace(
            _GGUF,
            planned_bytes=partial(gguf_files.planned_bytes, preferred=preferred),
            write=partial(gguf_files.write, preferred=preferred),
        )
        for name, preferred in PREFERRED.items()
    },
    **dict.fromkeys(PLAIN_GGUF, _GGUF),
}
"""Format name -> exporter."""


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was written."""

    format: str
    path: Path
    bytes: int
    """Bytes of the weight files."""
    exact: bool
    """An independent reader rebuilt every weight of the source, element by element. False only if ``allow_inexact`` let plain weights be
    rounded to another dtype; the reader then rebuilt the rounded weights."""
    rounding: CastError | None = None
    """Distance of the rounded weights from the source's; None if nothing was rounded."""
    runtimes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Results of ``qat.runtimes.check.check_runtimes``; {} if not requested."""
    proof: Proof
    """Result of the independent reader, with the hashes that ``decoct.json`` records. It lists no problems: otherwise nothing is
    written."""


def export_folder(
    source: Path | SourceFolder,
    target: Path,
    format: str,
    *,
    runtimes: bool = True,
    tokens: "Tensor | None" = None,
    allow_inexact: bool = False,
    reader_version: str | None = None,
) -> ExportResult:
    """Pack a model folder, check the result, and only then give it its final name.

    Codes and scales are stored as trained; nothing is rounded again. An independent reader rebuilds every weight and compares; with
    ``runtimes``, every installed runtime also loads the folder in a fresh process, and its logits are compared.

    Args:
        source: A folder that ``qat`` or ``quantize`` wrote; for gguf-f32, gguf-f16 and gguf-bf16 a folder with plain weights. A
            SourceFolder is read and proven once for several formats.
        target: The folder to create; it must not exist.
        format: A name in ``EXPORTERS``.
        runtimes: Also load the export in installed runtimes (some seconds). A missing runtime is reported and is no error.
        tokens: int64 [B, S], real text for the runtimes; adds their perplexity.
        reader_version: Version of the format's package that will read the export: compressed-tensors needs it for 3, 5, 6 and 7 bits.
        allow_inexact: Round plain weights to a dtype that does not hold them; the largest change is reported.

    Raises:
        UserError: unknown format, a source with missing or damaged codes, a spec the format cannot hold, an existing target, a failing or
            full disk.
        DecoctError: the result is not exact, or a runtime loads it and computes other logits. Nothing is left behind in either case. A
            runtime that refuses to load the export is reported with its message and is no error.
    """
    exporter = EXPORTERS.get(format)
    if exporter is None:
        near = difflib.get_close_matches(format, EXPORTERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"format {format!r} is not one of {', '.join(EXPORTERS)}{hint}")
    opening = source if isinstance(source, SourceFolder) else SourceFolder(source)
    source, target = opening.path, Path(target)
    # a new file among recorded ones would make the source look changed
    if target.resolve() != source.resolve() and target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{target} is inside the model folder {source}, whose files are recorded; choose a place outside it")
    with atomic_directory(target) as folder:
        check_record(source)  # the export gets new hashes, so damage must be found before packing
        # 1. everything that can refuse, before a byte is written
        opened = replace(opening.open(format), reader_version=reader_version)
        _check_tokenizer(source)
        check_limits(opened, format)
        if exporter.check_values:
            exporter.check_values(opened)
        # limits and sizes come before any weight is written: a refusal or a full disk must cost seconds, not the whole export
        planned = exporter.planned_bytes(opened)
        rounding = _rounding(opened, format, allow_inexact)
        # 2. the files
        check_free_space(folder, planned, f"the export {target}")
        config = exporter.config(opened)
        write_json_atomic(folder / "config.json", with_older_fields(config))
        exporter.write(folder, opened)
        _copy_companions(source, folder)
        # the proof reads the written files, so it must follow them; the record must follow the proof, whose hashes it stores
        # 3. proof, judges, card
        content = _record(opened)
        proof = _proven(folder, opened, content)
        seen = _checked_runtimes(folder, tokens) if runtimes else {}
        size = folder_bytes(folder)
        dequantize = needs_dequantizing(config.get("quantization_config") or {})
        facts = replace(_facts(opened, target.name, size, seen, rounding), format=format, dequantize=dequantize)
        (folder / "README.md").write_text(card_text(facts, exporter.card), encoding="utf-8")
        export = {"format": format, "bytes": size, "weights": proof.weights, "scales": proof.scales, "runtimes": seen}
        export |= {"rounding": asdict(rounding)} if rounding else {}
        write_record(folder, {**content, "export": export})
    return ExportResult(format=format, path=target, bytes=size, exact=rounding is None, runtimes=seen, rounding=rounding, proof=proof)


def _rounding(source: ExportSource, format: str, allow_inexact: bool) -> CastError | None:
    """Return what rounding plain weights changes; None if nothing changes. UserError if it changes weights without ``allow_inexact``."""
    # codes times scales are stored as they are: nothing is rounded
    if not isinstance(source, PlainSource):
        return None
    rounding = source.rounding()
    if rounding.changed and not allow_inexact:
        raise UserError(
            f"{format} does not hold {rounding.changed:,} of the weights of {source.folder} exactly (largest change "
            f"{rounding.largest:.2g}); {_HOLDS_ALL[format.partition('-')[0]]}"
        )
    return rounding if rounding.changed else None


def _check_tokenizer(source: Path) -> None:
    if not any(file.is_file() for pattern in (*TOKENIZER_FILES, "*.tiktoken") for file in source.glob(pattern)):
        raise UserError(
            f"{source} has no tokenizer ({', '.join(TOKENIZER_FILES)}), without which no server can read text; copy the tokenizer's files "
            "of the model it was made from into the folder"
        )


def _copy_companions(source: Path, folder: Path) -> None:
    for file in (file for pattern in _COPIED for file in source.glob(pattern) if file.is_file()):
        copy = folder / file.relative_to(source)
        # some chat templates lie in a folder of their own
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    # readers of transformers 4 get the export too
    mend_tokenizer_config(folder / "tokenizer_config.json")


def _proven(folder: Path, source: ExportSource, record: dict[str, Any]) -> Proof:
    """Compare every weight, the config and the metadata with the source; DecoctError if anything differs."""
    proof = prove(folder, source)
    # codes=False: the proof has decoded the codes and checked their ranges
    problems = proof.problems or structure_problems(folder, record, codes=False)
    if problems:
        raise DecoctError(
            f"the export is not exact: {problems[0]} ({len(problems)} problems in all). This is a fault of decoct, not of the model; "
            "nothing was left behind. Please report it."
        )
    return proof


def _checked_runtimes(folder: Path, tokens: "Tensor | None") -> dict[str, dict[str, Any]]:
    seen = check_runtimes(folder, tokens=tokens)
    for name, outcome in seen.items():
        # a runtime that refuses the export, or dies before it answers, proves nothing about its weights: report it, raise nothing
        if outcome["status"] == "differs":
            raise DecoctError(
                f"{name} ({outcome['version'] or 'version unknown'}) does not run the export as it was trained: {outcome['reason']}. "
                "Nothing was left behind; try another version of the runtime."
            )
    return seen


def _facts(source: ExportSource, name: str, size: int, runtimes: dict[str, dict[str, Any]], rounding: CastError | None) -> CardFacts:
    embedding = source.structure.embedding
    linears = [name for name in source.state.modules if name != embedding]
    scheme = Counter(source.state.spec_of(name).words() for name in linears)
    return CardFacts(
        # folders are often named after their format; the run's name was chosen by the user
        name=str(source.record.get("run") or name),
        base_model=source.record.get("base_model"),
        model_type=str(source.config.get("model_type", "unknown")),
        spec=source.state.spec if source.state.modules else None,
        quantized=len(linears),
        embedding=source.state.spec_of(embedding).words() if embedding in source.state.modules else "",
        unquantized=source.unquantized_linears,
        parameters=source.structure.parameters,
        weight_bytes=size,
        metrics=source.record.get("metrics") or {},
        runtimes=runtimes,
        scheme=dict(scheme) if len(scheme) > 1 else {},
        inputs=said_of(source.state.activations, "a module"),
        cache=said_of(source.state.cache and source.state.cache.spec, "for the keys and one for the values of a layer"),
        rounding=f"{rounding}." if rounding else "",
        left_out=left_out_words(left_out) if (left_out := source.record.get("left_out")) else "",
        origin=origin_words(source.record.get("imported") or {}),
    )


def _record(source: ExportSource) -> dict[str, Any]:
    """Return the source's part of ``decoct.json``; ``quant`` only if the export stores codes."""
    # plain weights have no codes, and a record of codes would make readers look for them
    record = {key: value for key, value in source.record.items() if key != "quant"}
    return record | ({"quant": source.state.record()} if source.state.modules else {})
