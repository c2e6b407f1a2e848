"""Limits of the compressed-tensors formats: every integer width, three kinds of floats, inputs in the weights' kind, fp8 keys and values.

Source: compressed-tensors ``compressors/pack_quantized``, ``quantization/quant_args.py``; vLLM ``compressed_tensors/schemes``.
"""

from collections.abc import Iterator

from ...spec import ONE_SCALING, PACKED_BITS, PACKED_FLOATS, QuantSpec
from .refusal import Beyond, Option, OtherFormat, Refusal, Remedy, Without, weights
from .shared import FP8_CACHE, integer_schemes, nearest_bits, packed, scale_grid, without_ends
from .stored_model import StoredModel

DENSE_VERSION = (0, 18, 0)
"""The first release that packs 3, 5, 6 and 7 bits as a dense stream (change #732); 0.17.1 still pads each word, under the same name."""


def limits(model: StoredModel) -> Iterator[Refusal]:
    """Yield what the formats of ``compressed_tensors/config.py`` cannot hold exactly."""
    yield from packed(model, head=True, floats=PACKED_FLOATS)
    model = without_ends(model, head=True)
    yield from scale_grid(model, "bf16", ("bf16_fp16", "bf16"), by_values=False, held=("int", "fp8_e4m3"))
    yield from _dense(model)
    yield from _inputs(model)
    yield from _cache(model)


def _dense(model: StoredModel) -> Iterator[Refusal]:
    """Yield widths that do not divide a 32-bit word: releases of the package pack them differently under the same name."""
    needed = ".".join(map(str, DENSE_VERSION))
    named = Option("reader_version", needed)
    for spec, modules in integer_schemes(model):
        # these widths divide a word, so the old and the new layout agree
        if spec.bits in PACKED_BITS:
            continue
        if model.reader_version is None:
            reason = f"packs {spec.bits} bits differently from version to version"
            ways = (weights(bits=nearest_bits(spec.bits)), named)
            yield Refusal(reason=reason, remedies=ways, modules=modules, spec=spec)
        elif not _is_dense(model.reader_version):
            old = f"reader_version={model.reader_version!r} does not read"
            reason = f"packs {spec.bits} bits in a layout that {old}: it must be {needed} or later"
            yield Refusal(reason=reason, remedies=(named,), modules=modules, spec=spec)


def _is_dense(version: str) -> bool:
    numbers = version.split(".")
    # a pre-release such as 0.18.0rc1 does not count: its layout is not known
    return all(number.isdecimal() for number in numbers) and tuple(map(int, numbers)) >= DENSE_VERSION


def _inputs(model: StoredModel) -> Iterator[Refusal]:
    """Yield schemes that do not fit rounded inputs: a kernel multiplies inputs and weights of one kind."""
    inputs, without = model.activations, Without("activations")
    if inputs is None:
        return
    if inputs.outliers is not None:
        way = Beyond("activations", (("outliers", None),))
        yield Refusal(reason="cannot say which inputs stay unrounded (outliers)", remedies=(way, OtherFormat("bitsandbytes")))
    wanted, said = _PARTNERS[inputs.kind]
    for spec, modules in model.schemes():
        # kinds that no format of the package holds are refused already
        if _fits(spec, inputs.kind) or (spec.kind != "int" and spec.kind not in PACKED_FLOATS):
            continue
        reason = f"takes {said}, not with {spec.words()}"
        ways: list[Remedy] = [weights(**{key: value for key, value in wanted.items() if key != "kind" or value != spec.kind}), without]
        # another kind of inputs is a way only where all modules fit it
        other = next((kind for kind in _PARTNERS if all(_fits(each.spec, kind) for each in model.modules)), None)
        if other is not None and inputs.symmetric:
            scaling = ONE_SCALING.get(other, inputs.scaling)
            ways.insert(0, Beyond("activations", (("kind", other), *((("scaling", scaling),) if scaling != inputs.scaling else ()))))
        yield Refusal(reason=reason, remedies=tuple(ways), modules=modules, spec=spec)


_PARTNERS: dict[str, tuple[dict[str, object], str]] = {
    "int8": ({"kind": "int", "bits": 8, "group_size": "channel"}, "int8 inputs with int8 weights that have a scale per row"),
    "fp8_e4m3": ({"kind": "fp8_e4m3", "bits": 8, "group_size": "channel"}, "fp8 inputs with fp8_e4m3 weights"),
    "mxfp4": ({"kind": "mxfp4", "bits": 4, "group_size": 32}, "mxfp4 inputs with mxfp4 weights"),
    "nvfp4": ({"kind": "nvfp4", "bits": 4, "group_size": 16}, "nvfp4 inputs with nvfp4 weights"),
}
"""Kind of the inputs -> (what their weights must be, the same in words)."""


def _fits(spec: QuantSpec, inputs: str) -> bool:
    """Return whether kernels multiply inputs of this kind by such weights."""
    # int8: along the whole row with the scales applied afterwards, so they cannot change within a row
    if inputs == "int8":
        return spec.kind == "int" and spec.bits == 8 and isinstance(spec.group_size, str)
    return spec.kind == inputs


def _cache(model: StoredModel) -> Iterator[Refusal]:
    """Yield unsupported roundings of keys and values: servers read symmetric fp8 with one stored scale each for a layer's keys and
    values."""
    cache = model.kv_cache
    # the one rounding that a config can describe and servers read
    if cache is None or (cache.kind, cache.scaling) == ("fp8_e4m3", "static"):
        return
    why = "servers read every 8-bit scheme as fp8" if cache.kind != "fp8_e4m3" else "it cannot describe one scale per token"
    reason = f"takes keys and values in fp8 with stored scales, not {cache.kind}, {cache.scaling}: {why}"
    yield Refusal(reason=reason, remedies=(FP8_CACHE, Without("kv_cache")))
