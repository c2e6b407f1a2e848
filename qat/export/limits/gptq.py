"""Limits of the GPTQ formats: 2, 4 and 8 bits in whole 32-bit words along inputs and outputs; version 1 only symmetric weights.

Source: GPTQModel ``nn_modules/qlinear/__init__.py``; vLLM ``layers/quantization/gptq*.py``.
"""

from collections.abc import Iterator

from ...spec import PACKED_BITS
from .refusal import OtherFormat, Refusal, weights
from .shared import bits, fp16_scales, integer_schemes, multiples, nothing_beyond_weights, packed, without_ends
from .stored_model import StoredModel


def limits_v1(model: StoredModel) -> Iterator[Refusal]:
    """Yield what version 1 cannot hold exactly: it stores zero points minus one, so it cannot store 0."""
    for spec, modules in integer_schemes(model):
        if not spec.symmetric:
            ways = (OtherFormat("gptq_v2"), weights(symmetric=True))
            yield Refusal(reason="stores only symmetric weights", remedies=ways, modules=modules, spec=spec)
    yield from limits_v2(model)


def limits_v2(model: StoredModel) -> Iterator[Refusal]:
    """Yield what version 2 cannot hold exactly."""
    yield from packed(model, head=True)
    model = without_ends(model, head=True)
    yield from bits(model, PACKED_BITS)
    yield from fp16_scales(model)
    yield from _whole_words(model)
    yield from nothing_beyond_weights(model)


def _whole_words(model: StoredModel) -> Iterator[Refusal]:
    """Yield modules that do not fill whole words. A word holds codes of neighbouring inputs (weights) or outputs (zero points)."""
    for spec, modules in integer_schemes(model):
        # refused by ``bits`` already
        if spec.bits not in PACKED_BITS:
            continue
        unit = 32 // spec.bits
        odd = [module for module in modules if module.rows % unit or module.columns % unit]
        if odd:
            # zero points are packed along the outputs, codes along the inputs
            side, size = ("outputs", odd[0].rows) if odd[0].rows % unit else ("inputs", odd[0].columns)
            reason = f"packs {unit} codes in a word, and {odd[0].kind} has {size:,} {side}, no multiple"
            yield multiples(model, reason, odd, unit, OtherFormat("compressed-tensors"))
