"""What a cut to a given shape keeps, by scores on calibration text."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..axis_map import WIDTHS, Axis
from ..family_map import family_of
from ..sizes import ChannelScore, DepthScore, sizes_of, target_sizes
from .choose import kept_by
from .kept import Kept
from .score_cache import ScoreCache
from .scores import Scores

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
    return selected(ScoreCache(model, batches, tell=tell), keep, score=score, depth_score=depth_score)


def selected(
    cache: ScoreCache,
    keep: Mapping[Axis, int],
    *,
    score: ChannelScore = "weight_activation",
    depth_score: DepthScore = "block_influence",
) -> Kept:
    """``select`` with scores that are computed where they are not known yet: one model, one text, any number of shapes."""
    config: Any = cache.model.config
    family = family_of(config)
    after, before = target_sizes(config, family, keep), sizes_of(config, family)
    # what is not cut needs no scores
    narrower = any(after.of(axis) < before.of(axis) for axis in WIDTHS)
    scores = cache.channels(score) if narrower else Scores(axes={})
    return kept_by(scores, cache.layers(after.layers, depth_score), before, after)
