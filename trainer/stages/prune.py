"""Stage `prune`: whole channels, or single weights; in one shot, or along a schedule while the student trains."""

from ..settings_pruning import PruneSettings
from ..stage_plan import trains
from .context import StageContext, StageResult, Trained
from .prune_rounds import finish_rounds, train_rounds
from .prune_structured import prune_structured
from .prune_weights import finish_masks, prune_once, train_masks
from .score_caches import score_together
from .shape_search import distil_shapes


def train(settings: PruneSettings, context: StageContext) -> Trained | None:
    """Prune along a schedule or in rounds while training; None when the stage prunes in one shot."""
    if trains(settings):
        return train_rounds(settings, context) if settings.structured else train_masks(settings, context)
    score_together(settings, context)
    if settings.structured is not None:
        distil_shapes(settings, context)
    return None


def finish(settings: PruneSettings, context: StageContext, trained: Trained | None) -> StageResult:
    """Write the trained student, or prune in one shot and write the result (rank 0)."""
    if trained is not None:
        return (finish_rounds if settings.structured else finish_masks)(settings, context, trained)
    return prune_once(settings, context) if settings.weights else prune_structured(settings, context)
