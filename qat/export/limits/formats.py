"""Table of export formats and their limits."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from . import awq, bitsandbytes, compressed_tensors, gguf, gptq, plain
from .refusal import Refusal
from .stored_model import StoredModel

LIMITS: dict[str, Callable[[StoredModel], Iterable[Refusal]]] = {
    "compressed-tensors": compressed_tensors.limits,
    "gptq": gptq.limits_v1,
    "gptq_v2": gptq.limits_v2,
    "awq": awq.limits,
    "bitsandbytes": bitsandbytes.limits,
    "safetensors": plain.limits,
    "safetensors-f32": plain.wide_limits,
    "gguf": gguf.limits,
    "gguf-q2_0": gguf.narrow_limits,
    "gguf-tq1_0": gguf.ternary_limits,
    "gguf-f32": gguf.plain_limits,
    "gguf-f16": gguf.plain_limits,
    "gguf-bf16": gguf.plain_limits,
}


def refusals(format: str, model: StoredModel) -> list[Refusal]:
    """Return what the format cannot hold of the model, most important first; [] if it holds the model exactly.

    Args:
        format: A name in ``LIMITS``.
        model: What is to be stored.
    """
    found: dict[str, Refusal] = {}
    for refusal in LIMITS[format](model):
        # several schemes may give the same reason: the first is the most frequent one
        found.setdefault(refusal.reason, replace(refusal, format=format))
    return list(found.values())
