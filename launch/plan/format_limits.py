"""What an export format cannot hold of a recipe's model, said before training: the exporters' own refusals, from shapes alone."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ...models.common.errors import UserError
from .stored_shapes import StoredShapes

if TYPE_CHECKING:
    from ...trainer.settings import ExportSettings

_PACKED_BITS = (2, 4, 8)


def refusals(cases: Sequence[StoredShapes], settings: "ExportSettings") -> list[str]:
    """One sentence, with the nearest setting that works, for each format that cannot hold the model; [] when all can.

    Args:
        cases: One for each lattice of the model.
        settings: The export.
    """
    said = [f"{form} {reason}" for form in settings.formats for case in cases for reason in _reasons(form, case, settings)]
    sizes = list(dict.fromkeys(case.spec.group_size for case in cases))
    if "awq" in settings.formats and len(sizes) > 1:
        other = " or ".join(cases[0].formats_fix(add=form, instead_of="awq") for form in ("compressed-tensors", "gptq"))
        said.append(f"awq has one group size, not {' and '.join(map(str, sizes))}; use {other}")
    if "gguf-q2_0" in settings.formats and cases and not any(map(_is_q2_0, cases)):
        other = cases[0].formats_fix(add="gguf", instead_of="gguf-q2_0")
        said.append(f"gguf-q2_0 is for symmetric weights of 2 bits in groups of a multiple of 64, and there are none; use {other}")
    return list(dict.fromkeys(said))[:8]


def _is_q2_0(case: StoredShapes) -> bool:
    spec = case.spec
    if (spec.kind, spec.bits, spec.symmetric) != ("int", 2, True):
        return False
    groups = spec.group_size == "channel" or int(spec.group_size) % 64 == 0
    return groups and any(columns % 64 == 0 for _, columns in case.linears.values())


def _reasons(form: str, case: StoredShapes, settings: "ExportSettings") -> Iterable[str]:
    if form == "safetensors":
        return [*_safetensors(case, settings), *_beside(form, case)]
    if form == "safetensors-f32":
        return [*_beside(form, case)]
    if case.spec.kind != "int":
        return [f"holds integer codes, not kind={case.spec.kind}; use {case.spec_fix(kind='int')}, or leave the format out"]
    return [*_of_ends(form, case), *_of_servers(form, case), *_RULES.get(form, _nothing)(case, settings), *_beside(form, case)]


def _nothing(case: StoredShapes, settings: "ExportSettings") -> Iterable[str]:
    return ()


def _of_ends(form: str, case: StoredShapes) -> Iterable[str]:
    if form.startswith("gguf"):
        return
    if "embedding" in case.ends:
        fix = case.formats_fix(add="gguf", instead_of=form)
        yield f"leaves the embedding alone; leave {case.keys.quantizer}embedding out, or use {fix}"
    if "head" in case.ends and form == "awq":
        fix = case.formats_fix(add="compressed-tensors", instead_of=form)
        yield f"has readers that take the head for a plain matrix; leave {case.keys.quantizer}head out, or use {fix}"


def _of_servers(form: str, case: StoredShapes) -> Iterable[str]:
    """What every packed format refuses: parts of one matrix with different lattices, and scales that 16 bits do not hold."""
    if case.apart and not form.startswith("gguf") and not case.apart.left:
        yield f"is read by servers that make one matrix of {', '.join(case.apart.names)}; give them one lattice"
    if case.spec.scale_grid == "fp32" or (form == "compressed-tensors" and case.spec.scale_grid == "fp16"):
        fix = case.spec_fix(scale_grid="bf16_fp16")
        yield f"stores scales in 16 bits, which do not hold scale_grid={case.spec.scale_grid}; use {fix}"


def _beside(form: str, case: StoredShapes) -> Iterable[str]:
    """Only compressed-tensors has words for what is rounded beside weights, and not for all of it."""
    if form != "compressed-tensors":
        for key, what in (("activations", "inputs"), ("kv_cache", "keys and values")):
            if getattr(case, key) is not None:
                fix = f"{case.keys.export}formats=[compressed-tensors]"
                yield f"cannot say that {what} are rounded ({key}); use {fix}, or leave {case.keys.quantizer}{key} out"
        return
    if case.activations is not None:
        if case.activations.kind != "int8":
            yield f"takes inputs in int8, not {case.activations.kind}; use {case.keys.quantizer}activations.kind=int8"
        if case.spec.bits != 8 or not isinstance(case.spec.group_size, str):
            fix = case.spec_fix(bits=8, group_size="channel")
            yield f"takes int8 inputs with int8 weights and a scale a row; use {fix}, or leave {case.keys.quantizer}activations out"
    if case.kv_cache is not None and (case.kv_cache.kind, case.kv_cache.scaling) != ("fp8_e4m3", "static"):
        at = f"{case.keys.quantizer}kv_cache"
        yield (
            f"takes keys and values in fp8 with stored scales, not {case.kv_cache.kind}, {case.kv_cache.scaling}; use "
            f"{at}.kind=fp8_e4m3 {at}.scaling=static, or leave {at} out"
        )


def _compressed_tensors(case: StoredShapes, settings: "ExportSettings") -> Iterable[str]:
    from ...qat.export.compressed_tensors.writer import check_reader

    bits = case.spec.bits
    if bits in _PACKED_BITS:
        return
    nearest = 4 if bits < 6 else 8
    if settings.reader_version is not None:
        try:
            check_reader(case.spec, settings.reader_version)
        except UserError as error:
            yield f"cannot be written so: {error}; use {case.keys.export}reader_version=0.18.0"
    else:
        yield (
            f"packs {bits} bits differently from version to version; use {case.spec_fix(bits=nearest)}, or name the version that will "
            f"read it: {case.keys.export}reader_version=0.18.0"
        )


def _gptq(case: StoredShapes, settings: "ExportSettings") -> Iterable[str]:
    if not case.spec.symmetric:
        fix = case.formats_fix(add="gptq_v2", instead_of="gptq")
        yield f"holds symmetric weights alone; use {fix}, or {case.spec_fix(symmetric='true')}"
    yield from _gptq_v2(case, settings)


def _gptq_v2(case: StoredShapes, settings: "ExportSettings") -> Iterable[str]:
    bits = case.spec.bits
    if bits not in _PACKED_BITS:
        yield f"packs 2, 4 and 8 bits, not {bits}; use {case.spec_fix(bits=4 if bits < 6 else 8)}"
        return
    unit = 32 // bits
    odd = {name: sizes for name, sizes in case.linears.items() if any(size % unit for size in sizes)}
    for name, sizes in list(odd.items())[:1]:
        side, size = next((side, size) for side, size in zip(("outputs", "inputs"), sizes) if size % unit)
        yield f"packs {unit} codes in a word, and {name} has {size:,} {side}, no multiple; {_narrower(case, list(odd), unit)}"


def _awq(case: StoredShapes, settings: "ExportSettings") -> Iterable[str]:
    if case.spec.bits != 4:
        yield f"packs 4 bits, not {case.spec.bits}; use {case.spec_fix(bits=4)}"
    odd = {name: rows for name, (rows, _) in case.linears.items() if rows % 8}
    for name, rows in list(odd.items())[:1]:
        yield f"packs 8 outputs in a word, and {name} has {rows:,}, no multiple; {_narrower(case, list(odd), 8)}"


def _safetensors(case: StoredShapes, settings: "ExportSettings") -> Iterable[str]:
    spec = case.spec
    if not settings.allow_inexact and (spec.kind not in ("int", "mxfp4") or spec.bits > 4 or not spec.symmetric):
        kind = spec.kind if spec.kind != "int" else f"{spec.bits}-bit" if spec.symmetric else "asymmetric"
        fix = f"{case.formats_fix(add='safetensors-f32', instead_of='safetensors')}, or {case.keys.export}allow_inexact=true"
        yield f"stores 16-bit floats, which do not hold {kind} codes times their scales; use {fix} to have them rounded"


def _narrower(case: StoredShapes, names: Sequence[str], unit: int) -> str:
    left_out = case.skip_fix(*(f"*.{name}" for name in names))
    narrower = case.ffn_fix(unit) if all(name.startswith("mlp.") for name in names) else ""
    return f"use {narrower}, or {left_out}" if narrower else f"use {left_out}"


_RULES: dict[str, Callable[[StoredShapes, "ExportSettings"], Iterable[str]]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "gptq_v2": _gptq_v2,
    "awq": _awq,
}
