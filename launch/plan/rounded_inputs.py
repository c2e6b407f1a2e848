"""Bytes that a stage saves more for its backward pass when quantized linears read rounded inputs, from shapes alone.

Each linear rounds for itself, so that three projections of one input keep three rounded copies. On a CPU a byte of flags for each
element comes on top, and what was read before rounding is free again unless somebody else keeps it; the Triton kernels keep it
instead of flags. Under autocast each linear had a copy of its own before, and the rounded one takes its place.
"""

from typing import TYPE_CHECKING

from .shapes import ModelShape, quantized_linears

if TYPE_CHECKING:
    from .memory_case import StageMemoryCase

_SHARED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
"""Linears that read one tensor, what a norm gives; every other one reads what no other does."""
_KEPT = ("o_proj", "out_proj")
"""What they read is the attention's result, which the attention keeps too."""


def rounded_input_bytes(student: ModelShape, case: "StageMemoryCase") -> int:
    """Of a micro-batch in one decoder layer (the mean of all); 0 where inputs are not rounded."""
    if not case.rounds_inputs or case.scheme is None:
        return 0
    rounded = quantized_linears(student, case.scheme)
    readers: dict[tuple[str, str], list[str]] = {}
    for name in student.linears:
        parent, _, leaf = name.rpartition(".")
        readers.setdefault((parent, _SHARED.get(leaf, leaf)), []).append(name)
    elements = sum(
        student.linears[names[0]][1] * _bytes(part, len(names), sum(name in rounded for name in names), case)
        for (_, part), names in readers.items()
    )
    return case.tokens * elements // max(1, student.layers)


def _bytes(part: str, readers: int, rounding: int, case: "StageMemoryCase") -> int:
    """More bytes for each element of an input that ``readers`` linears read, ``rounding`` of them rounded."""
    if not rounding:
        return 0
    flags = 0 if case.on_gpu else rounding
    if not case.mixed:
        stays = case.on_gpu or rounding < readers or part in _KEPT
        return 4 * rounding + flags - (0 if stays else 4)
    if part in _SHARED.values():
        # fp32, of which autocast kept bf16 copies alone, as it does now
        return 4 if case.on_gpu else flags
    return flags + (2 if case.on_gpu or part in _KEPT else 0)
