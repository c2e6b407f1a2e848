"""What a cut to a given shape keeps, by scores on calibration text."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..axis_map import WIDTHS, Axis
from ..family_map import family_of
from ..sizes import ChannelScore, DepthScore, sizes_of, target_sizes
from .choose import kept_by
from .depth import layers_by_influence, layers_by_loss
from .kept import Kept
from .scores import scored

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def select(
    model: "PreTrainedModel",
    batches: Sequence[Mapping[str, Tensor]],
    keep: Mapping[Axis, int],
    *,
    score: ChannelScore = "weight_activation",
    depth_score: DepthScore = "block_influence",
    tell: Callable[[str], None] = lambda text: None,
) -> Kept:
    """The indices that a cut of ``model`` to ``keep`` keeps: layers first, then the best of each layer that stays.

    Args:
        model: A model of a family with an axis map, in fp32; not changed.
        batches: Text, as for ``scored``. It is read once, and more often for a depth score that measures losses.
        keep: Axis -> what is kept of it.
        score: How channels and heads are ranked.
        depth_score: How layers are.
        tell: Gets a line for each layer that a loss removes.

    Raises:
        UserError: no model of the family has the shape, or there is no token to score on.
        NonFiniteError: a score is NaN or infinite.
    """
    family = family_of(model)
    after = target_sizes(model.config, family, keep)
    before = sizes_of(model.config, family)
    shallower = after.layers < before.layers
    axes: set[Axis] = {axis for axis in WIDTHS if after.of(axis) < before.of(axis)}
    if "heads" in axes:
        # groups are ranked by all that goes with them, and the heads inside them
        axes |= {"heads", "kv_heads"}
    scores = scored(model, batches, axes, score=score, influence=shallower and depth_score == "block_influence")
    layers = list(range(before.layers))
    if shallower and scores.influence is not None:
        layers = layers_by_influence(scores.influence, after.layers)
    elif shallower:
        layers = layers_by_loss(model, batches, after.layers, depth_score, tell)
    return kept_by(scores, layers, before, after)
