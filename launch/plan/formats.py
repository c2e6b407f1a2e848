"""What an export format cannot hold of a recipe's model, said before training: the exporters' own refusals, from shapes alone."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from .targets import Case

if TYPE_CHECKING:
    from ...trainer.settings import ExportSettings

_PACKED_BITS = (2, 4, 8)


def refusals(case: Case, settings: "ExportSettings") -> list[str]:
    """One sentence, with the nearest setting that works, for each format that cannot hold the model; [] when all can."""
    return [f"{form} {reason}" for form in settings.formats for reason in _RULES.get(form, _nothing)(case, settings)][:8]


def _nothing(case: Case, settings: "ExportSettings") -> Iterable[str]:
    return ()


def _compressed_tensors(case: Case, settings: "ExportSettings") -> Iterable[str]:
    bits = case.spec.bits
    if bits not in _PACKED_BITS and settings.reader_version is None:
        nearest = 4 if bits < 6 else 8
        yield (
            f"packs {bits} bits differently from version to version; use weights.bits={nearest}, or name the version that will read it: "
            "export.reader_version=0.18.0"
        )


def _gptq(case: Case, settings: "ExportSettings") -> Iterable[str]:
    if not case.spec.symmetric:
        yield "holds symmetric weights alone; add gptq_v2 to export.formats instead, or use weights.symmetric=true"
    yield from _gptq_v2(case, settings)


def _gptq_v2(case: Case, settings: "ExportSettings") -> Iterable[str]:
    bits = case.spec.bits
    if bits not in _PACKED_BITS:
        yield f"packs 2, 4 and 8 bits, not {bits}; use weights.bits={4 if bits < 6 else 8}"
        return
    unit = 32 // bits
    for name, sizes in case.linears.items():
        for side, size in zip(("outputs", "inputs"), sizes):
            if size % unit:
                yield f"packs {unit} codes in a word, and {name} has {size:,} {side}, no multiple; {_narrower(case, name, unit)}"
                return


def _awq(case: Case, settings: "ExportSettings") -> Iterable[str]:
    if case.spec.bits != 4:
        yield f"packs 4 bits, not {case.spec.bits}; use weights.bits=4"
    for name, (rows, _) in case.linears.items():
        if rows % 8:
            yield f"packs 8 outputs in a word, and {name} has {rows:,}, no multiple; {_narrower(case, name, 8)}"
            return


def _safetensors(case: Case, settings: "ExportSettings") -> Iterable[str]:
    spec = case.spec
    if not settings.allow_inexact and (spec.bits > 4 or not spec.symmetric):
        kind = f"{spec.bits}-bit" if spec.symmetric else "asymmetric"
        yield (
            f"stores 16-bit floats, which do not hold {kind} codes times their scales; use export.allow_inexact=true to have them rounded, "
            "or leave the format out (the quantized folder itself is a plain fp32 model)"
        )


def _narrower(case: Case, name: str, unit: int) -> str:
    if not name.startswith("mlp."):
        return f"add '*.{name}' to skip"
    return f"use prune.structured.ffn={max(unit, case.ffn // unit * unit)}, or add '*.{name}' to skip"


_RULES: dict[str, Callable[[Case, "ExportSettings"], Iterable[str]]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "gptq_v2": _gptq_v2,
    "awq": _awq,
    "safetensors": _safetensors,
}
