"""What serving kernels and vLLM take of a model's shape. It imports no torch: plans ask here before anything is cut."""

from collections.abc import Iterator, Mapping

from .axis_map import Axis, Family
from .sizes import Sizes

ALIGNMENT = 128
"""Widths should be multiples of this: groups of 128 then divide them, and Marlin's tiles of 64 x 128 need no padding."""


def alignment_advice(sizes: Sizes, cut: Mapping[Axis, int]) -> Iterator[str]:
    """A sentence for each axis that was cut to a width that packed int4 kernels pad, with the multiples next to it.

    Args:
        sizes: The new shape. Toy widths, of no more than one group, get no advice.
        cut: The axes that were cut.
    """
    widths = {"ffn": (sizes.ffn, 1), "hidden": (sizes.hidden, 1), "heads": (sizes.heads, sizes.head_dim)}
    readers = {"ffn": "the down projection", "hidden": "the projections that read the hidden states", "heads": "the output projection"}
    for axis, (number, channels) in widths.items():
        asked = axis in cut or (axis == "heads" and "kv_heads" in cut)
        width = number * channels
        if not asked or width <= ALIGNMENT or width % ALIGNMENT == 0:
            continue
        # whole heads fill a multiple: 128 / gcd(128, head_dim) of them
        unit = next(count for count in range(1, ALIGNMENT + 1) if count * channels % ALIGNMENT == 0)
        below = number - number % unit
        near = f"{below} or {below + unit}" if below else str(unit)
        what = f"structured.{axis}={number}"
        what += f" ({width:,} channels) is" if channels > 1 else " is"
        multiple = unit if channels > 1 else ALIGNMENT
        yield (
            f"{what} not a multiple of {multiple}: groups of {ALIGNMENT} do not divide {readers[axis]}, and packed int4 kernels pad it or "
            f"fall back; use {near}"
        )


def server_advice(family: Family, sizes: Sizes) -> Iterator[str]:
    """A sentence if vLLM's own class of the family computes another head_dim than this shape has."""
    if family.own_head_dim and not family.vllm_head_dim and sizes.hidden != sizes.heads * sizes.head_dim:
        yield (
            f"vLLM's own {family.name} takes head_dim as hidden / heads, which is not {sizes.head_dim} in this shape; keep hidden = "
            f"heads x {sizes.head_dim}, or serve with --model-impl transformers"
        )
