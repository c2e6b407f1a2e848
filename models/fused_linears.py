"""The linears of a decoder layer that servers join into one matrix. Imports no torch, so that limits of export formats need none."""

from collections.abc import Iterable

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of one block that read the same input. Servers join them into one matrix, so they need the same quantization spec."""
FUSED_NAMES = ("qkv_proj", "gate_up_proj")
"""Names of those matrices in servers."""


def joined(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Split full names of linears into those that servers join into one matrix, and single ones for the others, in order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        parts = next((parts for parts in FUSED if last in parts), None)
        groups.setdefault(name if parts is None else f"{parent}.{parts}", []).append(name)
    return [tuple(group) for group in groups.values()]
