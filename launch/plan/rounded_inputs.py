"""Additional bytes saved for the backward pass when quantized linears read rounded inputs, from shapes alone.

Each linear rounds its own input, so three projections of one input keep three rounded copies. On a CPU each element adds a byte of flags,
and the unrounded input is freed unless something else keeps it; the Triton kernels keep it instead of flags. Under autocast each linear
has a copy of its own anyway, which the rounded one replaces.
"""

from typing import TYPE_CHECKING

from .quantized_shapes import quantized_linears
from .shapes import ModelShape

if TYPE_CHECKING:
    from .memory_case import StageMemoryCase

_SHARED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
"""Linears that share an input, the output of a norm; every other linear has an input of its own."""
_KEPT = ("o_proj", "out_proj")
"""Linears that read the attention's result, which attention itself also keeps."""


def rounded_input_bytes(student: ModelShape, case: "StageMemoryCase") -> int:
    """Return the additional bytes of a micro-batch per decoder layer (mean over layers); 0 if inputs are not rounded."""
    if not case.rounds_inputs or case.scheme is None:
        return 0
    rounded = quantized_linears(student, case.scheme)
    readers: dict[tuple[str, str], list[str]] = {}
    for name in student.linears:
        # linears of one block that read the same tensor count as its readers
        parent, _, leaf = name.rpartition(".")
        readers.setdefault((parent, _SHARED.get(leaf, leaf)), []).append(name)
    elements = sum(
        # one of them for all: they share the input, and so its width
        student.linears[names[0]][1] * _bytes(part, len(names), sum(name in rounded for name in names), case)
        for (_, part), names in readers.items()
    )
    return case.tokens * elements // max(1, student.layers)


def _bytes(part: str, readers: int, rounding: int, case: "StageMemoryCase") -> int:
    """Return the additional bytes per element of an input that ``readers`` linears read, ``rounding`` of which round it."""
    if not rounding:
        return 0
    # one byte per element for each linear that rounds; Triton kernels keep the unrounded input instead
    flags = 0 if case.on_gpu else rounding
    # which values stay unrounded is kept twice: where they are left out, and where they are put back
    flags += 2 * rounding if case.keeps_outliers else 0
    if not case.mixed:
        # the unrounded input is freed when nobody needs it for the backward pass: no kernel, no linear that reads it unrounded, no
        # attention
        stays = case.on_gpu or rounding < readers or part in _KEPT
        return 4 * rounding + flags - (0 if stays else 4)
    if part in _SHARED.values():
        # the norm's output is fp32; without rounding, autocast keeps only its bf16 copies
        return 4 if case.on_gpu else flags
    return flags + (2 if case.on_gpu or part in _KEPT else 0)
