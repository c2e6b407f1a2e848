"""Which widths of a spec a format can hold, so that a choice of widths takes only those. Nothing is known of the model yet."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..gguf.blocks import PREFERRED, symmetric_type
from ..gguf.container import BLOCKS
from . import gguf
from .formats import LIMITS
from .refusal import Refusal
from .stored_model import StoredModel

if TYPE_CHECKING:
    from ...spec import ActivationSpec, QuantSpec

_GGUF = ("gguf", *PREFERRED)
_SIZE = 4096
"""Sides of the matrix that is asked about: a multiple of every block and word."""


def refused_width(
    form: str, spec: "QuantSpec", *, reader_version: str | None = None, allow_inexact: bool = False,
    activations: "ActivationSpec | None" = None,
) -> Refusal | None:  # fmt: skip
    """Return why the format cannot hold codes of ``spec.bits``; None if it can. What it says of the model's family does not count."""
    model = replace(
        StoredModel.of_weights(spec, _SIZE), reader_version=reader_version, allow_inexact=allow_inexact, activations=activations
    )
    limits = gguf.weight_limits if form in _GGUF else LIMITS[form]
    # by the scheme alone: what concerns the whole model is told by the plan, which knows it
    found = (refusal for refusal in limits(model) if refusal.spec is not None)
    return next((replace(refusal, format=form) for refusal in found), None)


def as_small_as(form: str, spec: "QuantSpec", wider: Sequence["QuantSpec"]) -> "QuantSpec | None":
    """Return the widest spec of ``wider`` that takes no more bytes in the format than ``spec``; None if none does.

    GGUF stores symmetric codes of 2 and 3 bits in blocks of 4 bits: the narrow codes would lose quality and save nothing.
    """
    if form not in _GGUF or not spec.symmetric:
        return None
    own = _block_bits(form, spec)
    alike = [other for other in wider if other.bits > spec.bits and _block_bits(form, other) <= own]
    return max(alike, key=lambda other: other.bits, default=None)


def _block_bits(form: str, spec: "QuantSpec") -> float:
    elements, size = BLOCKS[symmetric_type(spec, _SIZE, PREFERRED.get(form))]
    return 8 * size / elements
