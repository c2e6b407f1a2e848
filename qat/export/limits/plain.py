"""What plain safetensors hold: 16-bit floats only some codes times scales, fp32 every weight."""

from collections.abc import Iterator

from ...spec import QuantSpec
from .refusal import Option, OtherFormat, Refusal
from .shared import nothing_beyond_weights
from .stored_model import StoredModel

NAME, WIDE_NAME = "safetensors", "safetensors-f32"
FORMATS = (NAME, WIDE_NAME)
"""Formats whose weights are not packed."""


def limits(model: StoredModel) -> Iterator[Refusal]:
    """What 16-bit floats cannot hold exactly, unless ``allow_inexact`` lets them round it."""
    if not model.allow_inexact:
        for spec, modules in model.schemes():
            if not _fits(spec):
                reason = f"stores 16-bit floats, which do not hold {_words(spec)} codes times their scales"
                ways = (OtherFormat(WIDE_NAME), Option("allow_inexact", "true"))
                yield Refusal(reason=reason, remedies=ways, modules=modules, spec=spec, by_values=True)
    yield from wide_limits(model)


def wide_limits(model: StoredModel) -> Iterator[Refusal]:
    """What fp32 cannot: it has no words for what is rounded beyond weights."""
    return nothing_beyond_weights(model)


def _fits(spec: QuantSpec) -> bool:
    """Scales of bf16 have 8 significant bits and codes of int4 3, which are fp16's 11; those of mxfp4 are powers of two."""
    if spec.kind != "int":
        return spec.kind == "mxfp4"
    return spec.symmetric and spec.bits <= 4 and spec.scale_grid in ("bf16_fp16", "bf16")


def _words(spec: QuantSpec) -> str:
    if spec.kind != "int":
        return spec.kind
    if not spec.symmetric:
        return "asymmetric"
    return f"{spec.bits}-bit" if spec.bits > 4 else f"{spec.scale_grid}-scaled"
