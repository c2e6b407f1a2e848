"""What an export format cannot hold of a recipe's model, said before training: the exporters' own refusals, from shapes alone."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ...models.errors import UserError
from .cases import Case

if TYPE_CHECKING:
    from ...trainer.settings import ExportSettings

_PACKED_BITS = (2, 4, 8)


def refusals(cases: Sequence[Case], settings: "ExportSettings") -> list[str]:
    """One sentence, with the nearest setting that works, for each format that cannot hold the model; [] when all can.

    Args:
        cases: One for each lattice of the model.
        settings: The export.
    """
    said = [f"{form} {reason}" for form in settings.formats for case in cases for reason in _reasons(form, case, settings)]
    sizes = list(dict.fromkeys(case.spec.group_size for case in cases))
    if "awq" in settings.formats and len(sizes) > 1:
        said.append(f"awq has one group size, not {' and '.join(map(str, sizes))}; export to compressed-tensors or gptq instead")
    return list(dict.fromkeys(said))[:8]


def _reasons(form: str, case: Case, settings: "ExportSettings") -> Iterable[str]:
    if form == "safetensors":
        return [*_safetensors(case, settings), *_beside(form, case)]
    if form == "safetensors-f32":
        return [*_beside(form, case)]
    if case.spec.kind != "int":
        return [f"holds integer codes, not kind={case.spec.kind}; use weights.kind=int, or leave the format out"]
    return [*_of_ends(form, case), *_of_servers(form, case), *_RULES.get(form, _nothing)(case, settings), *_beside(form, case)]


def _nothing(case: Case, settings: "ExportSettings") -> Iterable[str]:
    return ()


def _of_ends(form: str, case: Case) -> Iterable[str]:
    if form.startswith("gguf"):
        return
    if "embedding" in case.ends:
        yield "leaves the embedding alone; leave 'embedding' out, or export to gguf"
    if "head" in case.ends and form == "awq":
        yield "has readers that take the head for a plain matrix; leave 'head' out, or export to compressed-tensors"


def _of_servers(form: str, case: Case) -> Iterable[str]:
    """What every packed format refuses: parts of one matrix with different lattices, and scales that 16 bits do not hold."""
    if case.apart and not form.startswith("gguf") and not case.apart.left:
        yield f"is read by servers that make one matrix of {', '.join(case.apart.names)}; give them one lattice"
    if case.spec.scale_grid == "fp32" or (form == "compressed-tensors" and case.spec.scale_grid == "fp16"):
        yield f"stores scales in 16 bits, which do not hold scale_grid={case.spec.scale_grid}; use weights.scale_grid=bf16_fp16"


def _beside(form: str, case: Case) -> Iterable[str]:
    """Only compressed-tensors has words for what is rounded beside weights, and not for all of it."""
    if form != "compressed-tensors":
        for key, what in (("activations", "inputs"), ("kv_cache", "keys and values")):
            if getattr(case, key) is not None:
                yield f"cannot say that {what} are rounded ({key}); export to compressed-tensors alone, or leave {key} out"
        return
    if case.activations is not None:
        if case.activations.kind != "int8":
            yield f"takes inputs in int8, not {case.activations.kind}; use activations.kind=int8"
        if case.spec.bits != 8 or not isinstance(case.spec.group_size, str):
            yield "takes int8 inputs with int8 weights and a scale a row; use weights.bits=8 weights.group_size=channel, or no activations"
    if case.kv_cache is not None and (case.kv_cache.kind, case.kv_cache.scaling) != ("fp8_e4m3", "static"):
        yield (
            f"takes keys and values in fp8 with stored scales, not {case.kv_cache.kind}, {case.kv_cache.scaling}; use "
            "kv_cache.kind=fp8_e4m3 kv_cache.scaling=static, or leave kv_cache out"
        )


def _compressed_tensors(case: Case, settings: "ExportSettings") -> Iterable[str]:
    from ...qat.export.compressed_tensors import check_reader

    bits = case.spec.bits
    if bits in _PACKED_BITS:
        return
    nearest = 4 if bits < 6 else 8
    if settings.reader_version is not None:
        try:
            check_reader(case.spec, settings.reader_version)
        except UserError as error:
            yield f"cannot be written so: export.{error}"
    else:
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
    if not settings.allow_inexact and (spec.kind not in ("int", "mxfp4") or spec.bits > 4 or not spec.symmetric):
        kind = spec.kind if spec.kind != "int" else f"{spec.bits}-bit" if spec.symmetric else "asymmetric"
        yield (
            f"stores 16-bit floats, which do not hold {kind} codes times their scales; export to safetensors-f32, "
            "or use export.allow_inexact=true to have them rounded"
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
}
