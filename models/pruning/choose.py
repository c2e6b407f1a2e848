"""The best by score: the same number in every layer, and of heads the same number in every group."""

from typing import Any

import torch
from torch import Tensor

from ..axis_map import Axis
from ..sizes import Sizes
from .kept import Kept
from .scores import Scores


def best(scores: Tensor, keep: int) -> list[int]:
    """Indices of the ``keep`` highest scores, ascending; of equal scores the first are kept.

    Args:
        scores: [n], finite.
        keep: At most n.
    """
    # the second sort keeps the order of channels, so that nothing but the selection changes
    return torch.sort(scores, descending=True, stable=True).indices[:keep].sort().values.tolist()


def best_heads(heads: Tensor, keys: Tensor, before: Sizes, after: Sizes) -> tuple[list[int], list[int]]:
    """(query heads, key/value heads) of one layer: the best key/value heads, and in the group of each the same number of its best heads.

    Query head h belongs to key/value head ``h // group``; the order is kept, so that the child's heads find theirs by the same rule.

    Args:
        heads: Scores [heads] of the query heads.
        keys: Scores [kv_heads] of whole groups.
        before: Sizes of the parent.
        after: Sizes of the child.
    """
    kept_keys = best(keys, after.kv_heads)
    size = before.group
    kept_heads = [key * size + index for key in kept_keys for index in best(heads[key * size : (key + 1) * size], after.group)]
    return kept_heads, kept_keys


def kept_by(scores: Scores, layers: list[int], before: Sizes, after: Sizes) -> Kept:
    """The best of these layers along every axis that gets smaller.

    Args:
        scores: Scores of the axes that get smaller; of both kinds of heads if either does.
        layers: The layers that are kept, ascending.
        before: Sizes of the parent.
        after: Sizes of the child.

    Raises:
        ValueError: the scores do not fit the sizes, which is a fault of the caller.
    """
    chosen: dict[str, Any] = {}
    if after.ffn < before.ffn:
        chosen["ffn"] = [best(part, after.ffn) for part in _per_layer(scores, "ffn", layers, before)]
    if after.heads < before.heads:
        parts = zip(_per_layer(scores, "heads", layers, before), _per_layer(scores, "kv_heads", layers, before))
        pairs = [best_heads(heads, keys, before, after) for heads, keys in parts]
        chosen["heads"] = [heads for heads, _ in pairs]
        if after.kv_heads < before.kv_heads:
            chosen["kv_heads"] = [keys for _, keys in pairs]
    if after.hidden < before.hidden:
        chosen["hidden"] = best(scores.hidden_of(layers), after.hidden)
    return Kept(layers=layers, **chosen)


def _per_layer(scores: Scores, axis: Axis, layers: list[int], before: Sizes) -> list[Tensor]:
    found = [scores.axes[axis][index] for index in layers]
    if any(tuple(part.shape) != (before.of(axis),) for part in found):
        raise ValueError(f"scores of {axis} have shapes {[tuple(part.shape) for part in found]}, not ({before.of(axis)},)")
    return found
