"""Limits of plain safetensors: 16-bit floats hold only some products of codes and scales; fp32 holds every weight."""

from collections.abc import Iterator

from ...spec import QuantSpec
from .refusal import Option, OtherFormat, Refusal
from .shared import nothing_beyond_weights
from .stored_model import StoredModel

NAME, WIDE_NAME = "safetensors", "safetensors-f32"
FORMATS = (NAME, WIDE_NAME)
"""Formats whose weights are not packed."""


def limits(model: StoredModel) -> Iterator[Refusal]:
    """Yield what 16-bit floats cannot hold exactly; with ``allow_inexact`` weights may be rounded."""
    # whoever allows rounding is told how far it went, not refused
    if not model.allow_inexact:
        for spec, modules in model.schemes():
            if not _fits(spec):
                reason = f"stores 16-bit floats, which do not hold {_words(spec)} codes times their scales"
                ways = (OtherFormat(WIDE_NAME), Option("allow_inexact", "true"))
                yield Refusal(reason=reason, remedies=ways, modules=modules, spec=spec, by_values=True)
    yield from wide_limits(model)


def wide_limits(model: StoredModel) -> Iterator[Refusal]:
    """Yield what fp32 cannot hold: it cannot describe the rounding of anything but weights."""
    return nothing_beyond_weights(model)


def _fits(spec: QuantSpec) -> bool:
    """Return whether a 16-bit float may hold code times scale: bf16 scales have 8 significant bits and int4 codes 3, together the 11 of
    fp16; mxfp4 scales are powers of two."""
    if spec.kind != "int":
        return spec.kind == "mxfp4"
    # without a zero point q has 3 significant bits at most: 8 + 3 = 11
    return spec.symmetric and spec.bits <= 4 and spec.scale_grid in ("bf16_fp16", "bf16")


def _words(spec: QuantSpec) -> str:
    if spec.kind != "int":
        return spec.kind
    if not spec.symmetric:
        return "asymmetric"
    return f"{spec.bits}-bit" if spec.bits > 4 else f"{spec.scale_grid}-scaled"
