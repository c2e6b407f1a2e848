"""Where the scores of a model on its calibration text are kept: ``<cache>/scores/<hash of model and text>/``."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ...models.calibration.calibration_text import CalibrationText
from ...models.common.cache_folder import cache_dir
from ...models.common.files import clean_leftovers, sha256_json
from ...models.family_map import family_of
from ...models.folder.model_folder import content_hash
from ...models.outline import outline_of
from ...models.pruning.ranks import ALONE, Ranks
from ...models.pruning.score_cache import ScoreCache
from ...models.pruning.score_store import FORMAT, ScoreStore
from ...models.shape_search import ShapeSpace, parse_budget
from ..processes.world import connect, current_world, sum_over_ranks
from ..settings_pruning import PruneSettings
from ..settings_structured import StructuredSettings
from .calibration import calibration_text
from .context import StageContext
from .student_and_teacher import whole_student

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Batches = Sequence[Mapping[str, torch.Tensor]]


def shape_space(config: "PreTrainedConfig", structured: StructuredSettings) -> ShapeSpace:
    """The shapes within the budget of a stage, from the config of its input.

    Raises:
        UserError: the family has no map, or no aligned shape is within the budget (on ``shapes``).
    """
    assert structured.budget is not None
    tensors = outline_of(config).tensors
    return ShapeSpace(config, family_of(config), tensors, parse_budget(structured.budget), structured.found_by.grid)


def score_cache(context: StageContext, model: "PreTrainedModel", batches: Batches, ranks: Ranks = ALONE) -> ScoreCache:
    """The scores of the stage's input on a text, as far as any run has computed them.

    Args:
        context: Context of the stage.
        model: Its input, in fp32.
        batches: All of the text.
        ranks: The processes that score together.
    """
    source = content_hash(context.input, context.input_revision)
    key = sha256_json({"format": FORMAT, "model": source, "text": _text_hash(batches)})
    folder = (context.scores or cache_dir() / "scores") / key[:32]
    if ranks.rank == 0:
        clean_leftovers(folder)
    return ScoreCache(model, batches, ScoreStore(folder), ranks=ranks, tell=context.say)


def tell_scores(cache: ScoreCache, context: StageContext) -> None:
    """Print whether scores were computed, and how long that took."""
    kept = "" if context.scores else ", and kept for other shapes of this model"
    how = f"computed in {cache.seconds:,.2f} s{kept}" if cache.computed else f"computed before, read in {cache.seconds:,.2f} s"
    context.say(f"  scores: {how}")


def score_together(settings: PruneSettings, context: StageContext) -> None:
    """Score on all processes of the run, each on its share of the windows; one process alone scores when it cuts."""
    world = current_world()
    if world.size == 1 or settings.structured is None:
        return
    connect(world)
    assert settings.calibration_tokens is not None
    text = calibration_text(context.run.data.train, settings.calibration_tokens, context.run.seed).batches
    ranks = Ranks(world.rank, world.size, sum_over_ranks)
    cache = score_cache(context, whole_student(context), text, ranks)
    structured = settings.structured
    if structured.cuts_widths:
        cache.prepare(structured.score or "weight_activation")
    depth = structured.depth_score or "block_influence"
    if structured.budget is not None:
        shapes = shape_space(cache.model.config, structured).shapes
        # of a greedy order the smallest number has all others in it
        depths = {shape.sizes.layers for shape in shapes} if depth == "contiguous" else {min(shape.sizes.layers for shape in shapes)}
    else:
        depths = set() if structured.layers is None else {structured.layers}
    for layers in sorted(depths):
        cache.layers(layers, depth)


def _text_hash(batches: Batches) -> str:
    """A hash of the windows and of where documents begin in them."""
    digest = hashlib.sha256(CalibrationText(batches=batches).fingerprint().encode())
    for batch in batches:
        if (positions := batch.get("position_ids")) is not None:
            digest.update(positions.to(torch.int32).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
