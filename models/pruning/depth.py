"""Which layers are kept when a model gets shallower. The first and the last one always are."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..family_map import family_of
from ..sizes import DepthScore
from .choose import best
from .ranks import ALONE, Ranks
from .score_store import ScoreStore
from .text_loss import mean_loss, without_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def layers_by_influence(influence: Tensor, keep: int) -> list[int]:
    """The ``keep`` layers with the highest block influence, with the first and the last; of equal ones the first are kept."""
    protected = influence.clone()
    protected[[0, -1]] = torch.inf
    return best(protected, keep)


def layers_by_loss(
    model: "PreTrainedModel",
    batches: Sequence[Mapping[str, Tensor]],
    keep: int,
    how: DepthScore,
    tell: Callable[[str], None] = lambda text: None,
    *,
    store: ScoreStore | None = None,
    ranks: Ranks = ALONE,
) -> list[int]:
    """The layers to keep by the loss on calibration text: greedily, or without the best contiguous block.

    ``greedy_loss`` removes one layer at a time, the one without which the loss is lowest, and measures all others again after each:
    about layers x removed passes over the text. ``contiguous`` measures every block of the right length once. Of equal losses the later
    layers go.

    Args:
        model: The model, of ``layers`` decoder layers; not changed.
        batches: The text; read once per measurement.
        keep: Layers that are kept, at least 2 (1 of 1).
        how: ``greedy_loss`` or ``contiguous``.
        tell: Gets a line after each removal.
        store: Where losses are kept: each is measured once for this model and text, and a smaller ``keep`` goes on from a larger one.
        ranks: The processes that measure together, each on its own batches.

    Raises:
        UserError: the text has no two tokens in a row.
        NonFiniteError: a loss is NaN or infinite.
    """
    total = len(family_of(model).layers(model))
    known = ScoreStore() if store is None else store

    def loss(dropped: Sequence[int]) -> float:
        with without_layers(model, dropped):
            return mean_loss(model, batches, ranks)

    def remembered(part: str, dropped: Sequence[Sequence[int]]) -> list[float]:
        found = known.numbers(part).get("losses", [])
        # the first process decides, since it alone may see the store
        if not ranks.first_says(len(found) == len(dropped)):
            # the same on every process
            found = [loss(layers) for layers in dropped]
            if ranks.rank == 0:
                known.put_numbers(part, {"losses": found})
        return list(ranks.sum(torch.tensor(found if ranks.rank == 0 else [0.0] * len(dropped), dtype=torch.float64)).tolist())

    remove = total - keep
    if how == "contiguous":
        starts = range(1, total - remove)
        measured = remembered(f"without-blocks-of-{remove}", [range(start, start + remove) for start in starts])
        losses = dict(zip(starts, measured, strict=True))
        # the last of equal ones
        first = min(reversed(starts), key=losses.__getitem__)
        tell(f"  without layers {first} to {first + remove - 1} the loss is {losses[first]:.4f}, the lowest of {len(losses)} blocks")
        return [index for index in range(total) if not first <= index < first + remove]
    left = list(range(total))
    while len(left) > keep:
        gone = [index for index in range(total) if index not in left]
        # what is gone after so many removals follows from the losses before: the number names the step
        measured = remembered(f"without-{len(gone) + 1}", [[*gone, index] for index in left[1:-1]])
        losses = dict(zip(left[1:-1], measured, strict=True))
        worst = min(reversed(left[1:-1]), key=losses.__getitem__)
        left.remove(worst)
        tell(f"  without layer {worst} the loss is {losses[worst]:.4f}; {len(left)} layers are left")
    return left
