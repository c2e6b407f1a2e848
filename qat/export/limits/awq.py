"""Limits of the AWQ format: 4 bits, one group size for all modules, outputs in whole words.

Source: AutoAWQ ``modules/linear/gemm.py``, ``utils/packing_utils.py``; vLLM ``layers/quantization/awq*.py``.
"""

from collections.abc import Iterator

from .refusal import OtherFormat, Refusal, listed
from .shared import bits, fp16_scales, multiples, nothing_beyond_weights, packed, without_ends
from .stored_model import StoredModel

BITS = (4,)
PER_WORD = 8
"""Codes per 32-bit word."""


def limits(model: StoredModel) -> Iterator[Refusal]:
    """Yield what the version "gemm" cannot hold exactly."""
    yield from packed(model, head=False)
    model = without_ends(model, head=False)
    yield from bits(model, BITS)
    yield from fp16_scales(model)
    yield from _one_group_size(model)
    # codes are packed along the outputs, unlike in the other formats
    odd = [module for module in model.modules if module.spec.kind == "int" and module.rows % PER_WORD]
    if odd:
        reason = f"packs {PER_WORD} outputs in a word, and {odd[0].kind} has {odd[0].rows:,}, no multiple"
        yield multiples(model, reason, odd, PER_WORD, OtherFormat("compressed-tensors"))
    yield from nothing_beyond_weights(model)


def _one_group_size(model: StoredModel) -> Iterator[Refusal]:
    integers = [module for module in model.modules if module.spec.kind == "int"]
    # config.json has one group_size and no entries per module
    sizes = list(dict.fromkeys(module.group for module in integers))
    if len(sizes) > 1:
        reason = f"has one group size, not {listed(['channel' if size is None else size for size in sizes])}"
        other = next(module for module in integers if module.group != sizes[0])
        yield Refusal(reason=reason, remedies=(OtherFormat("compressed-tensors"), OtherFormat("gptq")), modules=(other,))
