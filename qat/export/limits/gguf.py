"""Limits of the GGUF formats: families that llama.cpp computes in the same way, integer codes in blocks of 32 (Q2_0: 64, ternary: 256) with
one fp16 scale, or in super-blocks of 256 (q2_k to q6_k, whose widths the spec checks), mxfp4.

Source: ggml ``ggml-common.h``, ``ggml-quants.c``; llama.cpp ``llama-model.cpp``.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ....models.common.errors import UserError
from ...super_blocks import SUPER_BLOCKS, WIDTH
from ..gguf.blocks import ASYMMETRIC_BITS, BLOCK, WIDE_BLOCK, is_q2_0, is_ternary
from ..gguf.metadata import model_metadata
from ..gguf.names import architecture_of, gguf_place
from .refusal import OtherFormat, Refusal, weights
from .shared import fp16_scales, integer_schemes, multiples, nothing_beyond_weights, packed
from .stored_model import StoredModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


GGUF_FLOATS = ("mxfp4",)
GGUF_KINDS = (*SUPER_BLOCKS, *GGUF_FLOATS)
"""Kinds that GGUF holds beside integers."""


def limits(model: StoredModel) -> Iterator[Refusal]:
    """Yield what ``gguf`` cannot hold exactly."""
    yield from plain_limits(model)
    yield from weight_limits(model)


def weight_limits(model: StoredModel) -> Iterator[Refusal]:
    """Yield what ``gguf`` cannot hold of the quantized weights, whatever the family."""
    yield from packed(model, head=True, fused=False, embedding=True, super_blocks=True, floats=GGUF_FLOATS)
    yield from _blocks(model)
    yield from fp16_scales(model)


def narrow_limits(model: StoredModel) -> Iterator[Refusal]:
    """Yield what ``gguf-q2_0`` cannot hold exactly; it also refuses models without a single Q2_0 block."""
    # without such a block the file would be that of ``gguf``, which older llama.cpp reads too
    if model.modules and not any(is_q2_0(module.spec, module.columns) for module in model.modules):
        reason = f"is for symmetric weights of 2 bits in groups of a multiple of {WIDE_BLOCK}, and there are none"
        yield Refusal(reason=reason, remedies=(OtherFormat("gguf"),))
    yield from limits(model)


def ternary_limits(model: StoredModel) -> Iterator[Refusal]:
    """Yield what ``gguf-tq1_0`` cannot hold exactly; it also refuses models without a single TQ1_0 block."""
    if model.modules and not any(is_ternary(module.spec, module.columns) for module in model.modules):
        reason = f"is for ternary weights in groups of a multiple of {WIDTH}, and there are none"
        yield Refusal(reason=reason, remedies=(OtherFormat("gguf"),))
    yield from limits(model)


def plain_limits(model: StoredModel) -> Iterator[Refusal]:
    """Yield what the formats of plain weights cannot hold: families without a llama.cpp equivalent, and rounding of anything but
    weights."""
    if reason := family_refusal(model.config, model.tensors):
        yield Refusal(reason=f"cannot hold this model: {reason}")
    yield from nothing_beyond_weights(model)


def family_refusal(config: "PreTrainedConfig", names: Iterable[str]) -> str | None:
    """Return why llama.cpp has no equivalent of the model; None if it has one.

    Args:
        config: The model's transformers config.
        names: Names of all its weights.
    """
    try:
        # the exporter's own functions decide: they raise for whatever they have no GGUF name or value for
        architecture = architecture_of(config.model_type)
        model_metadata(config, architecture)
        for name in names:
            gguf_place(name, architecture)
    except UserError as error:
        return str(error)
    return None


def _blocks(model: StoredModel) -> Iterator[Refusal]:
    for spec, modules in integer_schemes(model):
        ways = (weights(symmetric=True), weights(bits=4))
        if not spec.symmetric and spec.bits > ASYMMETRIC_BITS[-1]:
            reason = f"holds asymmetric codes of {ASYMMETRIC_BITS[-1]} bits at most, not {spec.bits}"
            yield Refusal(reason=reason, remedies=ways, modules=modules, spec=spec)
        elif not spec.symmetric and spec.bits == ASYMMETRIC_BITS[-1]:
            # at fewer bits the block has spare codes, so the codes can be shifted until fp16 holds the minimum
            reason = "stores zero point times scale in fp16 (Q5_1), which hardly ever holds it at 5 bits"
            yield Refusal(reason=reason, remedies=ways, modules=modules, spec=spec, by_values=True)
        # a group is written as several blocks with the same scale, so it must end where a block ends
        if modules[0].group is not None and modules[0].group % BLOCK:
            reason = f"has one scale for a block of {BLOCK} weights, and groups of {modules[0].group} are no multiple"
            yield Refusal(reason=reason, remedies=(weights(group_size=BLOCK),), modules=modules, spec=spec)
        # a block never crosses rows
        odd = [module for module in modules if module.columns % BLOCK]
        if odd:
            reason = f"stores blocks of {BLOCK} along the inputs, and {odd[0].kind} has {odd[0].columns:,}, no multiple"
            yield multiples(model, reason, odd, BLOCK)
