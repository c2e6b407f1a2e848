"""What a family cannot do with a transform, and what a transform leaves as it is: asked by plans and stages. It imports no torch."""

from collections.abc import Iterable
from typing import Any

from ...models.couplings import couplings, output_norms, uncoupled
from ...models.family_map import FAMILIES, no_map
from ...models.sizes import sizes_of
from .hadamard_orders import nearest_sizes, order_of
from .settings import TransformSettings

ALPHAS = tuple(step / 20 for step in range(21))
"""The grid of AWQ's search: 20 steps, as in its code."""
SEARCHED = 1 + len(ALPHAS)
"""Scales that AWQ compares for each input: none, and the grid."""
ROTATED_AT_ONCE = 2**22
"""Numbers that are rotated at a time, in fp64."""
_LEAVE = "leave 'transform' out"


def transform_refusal(settings: TransformSettings, config: Any, *, sparse: bool, tensors: Iterable[str] = ()) -> str | None:
    """Why a transform cannot be applied, with what to do; None if it can.

    Args:
        settings: The transform.
        config: Config of the model.
        sparse: Whether exact zeros of its weights are a pruning mask.
        tensors: Names of its parameters, which the axis map must have; () if they are known to be there.
    """
    kind, family = config.model_type, FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        missing = f"its axis map is missing, which says what norm or linear stands before each linear; there is one of {known}"
        # experts have a reason of their own
        reason = no_map(config).partition("; ")[0] if "experts" in no_map(config) else missing
        return f"model type {kind!r}: {reason}; {_LEAVE}"
    if unknown := family.missing(tensors):
        return f"model type {kind!r}: its axis map does not have {', '.join(unknown)}; {_LEAVE}"
    if settings.method != "rotation":
        return None
    if sparse:
        return (
            "a rotation mixes channels, so that pruned weights would not stay zero; use transform: awq or smoothquant, or prune afterwards"
        )
    if settings.residual and (reason := _no_residual(config)):
        return f"model type {kind!r}: the residual stream cannot be rotated: {reason}; use transform: {{method: rotation, residual: false}}"
    sizes = sizes_of(config, family)
    for wanted, size, words, key in (
        (settings.residual, sizes.hidden, "hidden size", "residual"),
        (settings.heads, sizes.head_dim, "head size", "heads"),
    ):
        if wanted and order_of(size) is None:
            near = " and ".join(f"{number:,}" for number in nearest_sizes(size))
            use = f"use {key}: false, or another transform"
            return f"no Hadamard matrix is known for the {words} {size:,}; the nearest sizes are {near}; {use}"
    return None


def transform_notes(settings: TransformSettings, config: Any, *, embedding: bool) -> list[str]:
    """What a transform that can be applied leaves as it is, or adds, one sentence each.

    Args:
        settings: The transform.
        config: Config of the model.
        embedding: Whether the embedding is rounded.
    """
    if settings.method != "rotation":
        left = uncoupled(config)
        if not left:
            return []
        scaled = [reader for one in couplings(config) for reader in one.readers]
        return [
            f"transform {settings.method}: model type {config.model_type!r} has no norm or linear before {', '.join(left)} that could take "
            f"their scales; {', '.join(scaled)} are scaled, the others stay as they are"
        ]
    if settings.residual and getattr(config, "tie_word_embeddings", False):
        rows = getattr(config, "vocab_size", 0)
        size = 2 * rows * sizes_of(config, FAMILIES[config.model_type]).hidden
        left = "; it is not rounded, because 'embedding' no longer applies to it" if embedding else ""
        return [f"transform rotation: the output head is untied from the embedding, which adds {size:,} bytes in bf16{left}"]
    return []


def unties(settings: TransformSettings | None, config: Any) -> bool:
    """Whether a tied head gets weights of its own."""
    return settings is not None and bool(settings.residual) and bool(getattr(config, "tie_word_embeddings", False))


def _no_residual(config: Any) -> str | None:
    family = FAMILIES[config.model_type]
    if family.layer_norm:
        return "its norms are LayerNorms, which subtract a mean that a rotation does not keep"
    if left := output_norms(config, family):
        return f"the gains of {', '.join(left)} stand between a block and the residual stream, and no matrix behind them can take them"
    return None
