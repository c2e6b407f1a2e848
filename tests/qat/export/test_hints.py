"""Every remedy that an exporter names is followed as it is written, and then the export is made."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from decoct.models.common.errors import UserError
from decoct.qat.export.export import export_folder
from decoct.qat.scheme import QuantScheme, SpecChange
from decoct.qat.spec import QuantSpec

Build = Callable[..., Path]
Way = tuple[dict[str, Any], str, dict[str, Any]]
WIDE: dict[str, Any] = {"intermediate_size": 64}
ASYMMETRIC = QuantSpec(bits=4, group_size=16, symmetric=False)


def way(form: str, options: dict[str, Any] | None = None, **folder: Any) -> Way:
    """What is built, the format, and options of the export."""
    return folder, form, options or {}


Follow = Callable[..., list[Way]]
HINTS: dict[str, tuple[Way, str, Follow]] = {
    "awq, 8 bits": (way("awq", bits=8), r"quantize with bits=(\d)", lambda bits: [way("awq", bits=int(bits))]),
    "gptq, 6 bits": (way("gptq", bits=6), r"quantize with bits=(\d)", lambda bits: [way("gptq", bits=int(bits))]),
    "gptq, zero points": (
        way("gptq", spec=ASYMMETRIC),
        r"export to (gptq_v2), or quantize with symmetric=true",
        lambda other: [way(other, spec=ASYMMETRIC), way("gptq", bits=4)],
    ),
    "gptq, odd widths": (
        way("gptq", group_size=2, intermediate_size=46),
        r"prune with structured\.ffn=(\d+), or quantize with skip: \['(\S+)', '(\S+)', '(\S+)'\], or export to (\S+)",
        lambda ffn, *found: [
            way("gptq", group_size=2, intermediate_size=int(ffn)),
            way("gptq", group_size=2, intermediate_size=46, skip=found[:3]),
            way(found[3], group_size=2, intermediate_size=46),
        ],
    ),
    "awq, odd outputs": (
        way("awq", group_size=2, intermediate_size=46),
        r"prune with structured\.ffn=(\d+), or quantize with skip: \['(\S+)', '(\S+)'\], or export to (\S+)",
        lambda ffn, *found: [
            way("awq", group_size=2, intermediate_size=int(ffn)),
            way("awq", group_size=2, intermediate_size=46, skip=found[:2]),
            way(found[2], group_size=2, intermediate_size=46),
        ],
    ),
    "awq, two group sizes": (
        way("awq", scheme=QuantScheme(weights=QuantSpec(bits=4, group_size=16), overrides={"*.down_proj": SpecChange(group_size=8)})),
        r"export to (\S+), or (\S+)",
        lambda *others: [
            way(form, scheme=QuantScheme(weights=QuantSpec(bits=4, group_size=16), overrides={"*.down_proj": SpecChange(group_size=8)}))
            for form in others
        ],
    ),
    "compressed-tensors, 3 bits": (
        way("compressed-tensors", bits=3),
        r"quantize with bits=(\d), .*--reader-version (\S+)$",
        lambda bits, version: [
            way("compressed-tensors", bits=int(bits)),
            way("compressed-tensors", {"reader_version": version}, bits=3),
        ],
    ),
    "gguf, groups of 16": (
        way("gguf", group_size=16, **WIDE),
        r"quantize with group_size=(\d+)",
        lambda size: [way("gguf", group_size=int(size), **WIDE)],
    ),
    "gguf, rows that are no blocks": (
        way("gguf", group_size="channel"),
        r"prune with structured\.ffn=(\d+), or quantize with skip: \['(\S+)'\]",
        lambda ffn, *skip: [
            way("gguf", group_size="channel", intermediate_size=int(ffn)),
            way("gguf", group_size="channel", skip=skip),
        ],
    ),
    "gguf, zero points of 8 bits": (
        way("gguf", spec=QuantSpec(bits=8, group_size=32, symmetric=False), **WIDE),
        r"quantize with symmetric=(true), or bits=(\d)",
        lambda _, bits: [
            way("gguf", spec=QuantSpec(bits=8, group_size=32), **WIDE),
            way("gguf", spec=QuantSpec(bits=int(bits), group_size=32, symmetric=False), **WIDE),
        ],
    ),
    "gguf-q2_0, 4 bits": (
        way("gguf-q2_0", group_size=32, **WIDE),
        r"export to (\S+)$",
        lambda other: [way(other, group_size=32, **WIDE)],
    ),
    "safetensors, 8 bits": (
        way("safetensors", bits=8),
        r"--format (\S+) holds every weight .*--(allow)-inexact",
        lambda other, _: [way(other, bits=8), way("safetensors", {"allow_inexact": True}, bits=8)],
    ),
    "an embedding of codes": (
        way("gptq", scheme=QuantScheme(weights=QuantSpec(bits=4, group_size=32), embedding=SpecChange(bits=8)), **WIDE),
        r"leave 'embedding' out, or export to (\S+)",
        lambda other: [
            way("gptq", bits=4, group_size=32, **WIDE),
            way(other, scheme=QuantScheme(weights=QuantSpec(bits=4, group_size=32), embedding=SpecChange(bits=8)), **WIDE),
        ],
    ),
    "a head of codes": (
        way(
            "awq",
            scheme=QuantScheme(weights=QuantSpec(bits=4, group_size=16), head=SpecChange(bits=4)),
            tie_word_embeddings=False,
            vocab_size=264,
        ),
        r"expect an unquantized head \(lm_head\); leave 'head' out, or export to (\S+)",
        lambda other: [
            way("awq", bits=4, tie_word_embeddings=False, vocab_size=264),
            way(
                other,
                scheme=QuantScheme(weights=QuantSpec(bits=4, group_size=16), head=SpecChange(bits=4)),
                tie_word_embeddings=False,
                vocab_size=264,
            ),
        ],
    ),
}


@pytest.mark.parametrize("case", HINTS)
def test_the_export_is_made_by_each_of_the_remedies(quantized_folder: Build, tmp_path: Path, case: str) -> None:
    (folder, form, options), said, follow = HINTS[case]
    with pytest.raises(UserError) as told:
        export_folder(quantized_folder(**folder), tmp_path / "refused", form, runtimes=False, **options)
    match = re.search(said, str(told.value))
    assert match, str(told.value)
    for number, (other, other_form, more) in enumerate(follow(*match.groups())):
        made = export_folder(quantized_folder(**other), tmp_path / f"export-{number}", other_form, runtimes=False, **more)
        assert made.exact or more.get("allow_inexact")
