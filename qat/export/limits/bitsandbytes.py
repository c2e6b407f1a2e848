"""Limits of the formats of bitsandbytes: int8 by row together with int8 inputs, or NF4 in blocks; one of the two for all modules.

Source: bitsandbytes ``nn/modules.py`` (Linear8bitLt, Linear4bit), ``functional.py`` (block sizes of ``quantize_4bit``).
"""

from collections.abc import Iterator
from dataclasses import replace

from ...spec import ActivationSpec, QuantSpec
from .refusal import Beyond, OneScheme, OtherFormat, Refusal, Without, weights
from .shared import ends, nothing_beyond_weights, without_ends
from .stored_model import StoredModel

BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
"""Weights that share an absmax."""
_INT8_INPUTS = (("kind", "int8"), ("scaling", "dynamic"))


def limits(model: StoredModel) -> Iterator[Refusal]:
    """Yield what the formats cannot hold exactly."""
    if not model.modules:
        yield Refusal(reason="packs quantized linears, and the model has none", remedies=(OtherFormat("safetensors"),))
    yield from ends(model, head=False, embedding=False)
    model = without_ends(model, head=False)
    yield from _codes(model)
    yield from _one_scheme(model)
    yield from _inputs(model)
    # what is said of inputs is above
    yield from nothing_beyond_weights(replace(model, activations=None))


def _is_int8(spec: QuantSpec) -> bool:
    return spec.kind == "int" and spec.bits == 8 and spec.symmetric and spec.group_size == "channel"


def _codes(model: StoredModel) -> Iterator[Refusal]:
    for spec, modules in model.schemes():
        if spec.kind == "nf4":
            if spec.group_size not in BLOCKS:
                # rows of the whole width differ in size from module to module
                reason = f"has NF4 in blocks of {BLOCKS[0]} to {BLOCKS[-1]} weights, powers of two, not {spec.words()}"
                yield Refusal(reason=reason, remedies=(weights(group_size=64),), modules=modules, spec=spec)
        elif not _is_int8(spec):
            reason = f"holds int8 with one scale per row, or NF4, not {spec.words()}"
            ways = (weights(bits=8, group_size="channel", symmetric=True),) if spec.kind == "int" else ()
            yield Refusal(reason=reason, remedies=(*ways, OtherFormat("safetensors-f32")), modules=modules, spec=spec)


def _one_scheme(model: StoredModel) -> Iterator[Refusal]:
    schemes = [(spec, modules) for spec, modules in model.schemes() if _is_int8(spec) or spec.group_size in BLOCKS]
    stored = {(spec.kind, spec.group_size) for spec, _ in schemes}
    if len(stored) > 1:
        first, (other, modules) = schemes[0][0], schemes[1]
        reason = f"has one scheme for all modules, not {first.words()} and {other.words()}"
        names = tuple(dict.fromkeys(module.kind.rpartition(".")[2] for module in modules))
        yield Refusal(reason=reason, remedies=(OneScheme(names), OtherFormat("safetensors-f32")), modules=modules[:1])


def _inputs(model: StoredModel) -> Iterator[Refusal]:
    """Yield inputs that are rounded otherwise: int8 weights always go with int8 inputs, NF4 weights with inputs as they are."""
    inputs = model.activations
    kinds = {spec.kind for spec, _ in model.schemes()}
    if "nf4" in kinds and inputs is not None:
        yield Refusal(reason="multiplies NF4 weights with unrounded inputs", remedies=(Without("activations"),))
    if "int" not in kinds:
        return
    if inputs is None:
        reason = "rounds the inputs of int8 weights to int8, and this model was not measured so"
        yield Refusal(reason=reason, remedies=(Beyond("activations", (("kind", "int8"),)), OtherFormat("compressed-tensors")))
    elif not _like_its_kernel(inputs):
        yield Refusal(
            reason=f"rounds inputs to int8 by token, without zero points, not {inputs.kind}, {inputs.scaling}",
            remedies=(Beyond("activations", (*_INT8_INPUTS, ("symmetric", True))),),
        )


def _like_its_kernel(inputs: ActivationSpec) -> bool:
    return inputs.kind == "int8" and inputs.scaling == "dynamic" and inputs.symmetric
