"""Memory of losses on hidden states and attention relations, from shapes alone."""

from typing import TYPE_CHECKING

from ...models.common.errors import UserError
from ...models.layer_pairs import LayerPairs, layer_pairs
from .memory_case import FeatureCase, StageMemoryCase
from .shapes import ModelShape
from .stage_shapes import ImpossibleStageError

if TYPE_CHECKING:
    from ...configs.recipe import StageEntry
    from ...losses.settings_features import HiddenSettings, RelationSettings

_WORK = 4
"""fp32 copies of a pair's states while its term is computed: student, teacher, their difference, and a gradient."""
_RELATIONS = 6
"""fp32 matrices [heads, S, S] of one sequence while its relation is computed: scores and log-probabilities of both, and two gradients."""


def feature_case(entry: "StageEntry", student: ModelShape, teacher: ModelShape) -> FeatureCase | None:
    """Return what a stage compares; None if it learns from predictions alone.

    Raises:
        ImpossibleStageError: a pair of layers does not exist.
    """
    asked = entry.settings.loss.features
    if asked is None:
        return None

    def pairs(part: "HiddenSettings | RelationSettings | None", name: str) -> LayerPairs:
        if part is None:
            return []
        # which layers were kept is recorded when the model is made; for their number any will do
        kept = [min(index, teacher.layers - 1) for index in range(student.layers)]
        try:
            return layer_pairs(part.layers, student.layers, teacher.layers, kept, f"{entry.name}: loss.features.{name}.layers")
        except UserError as error:
            raise ImpossibleStageError(str(error)) from error

    hidden, relations = pairs(asked.hidden, "hidden"), pairs(asked.relations, "relations")
    heads = (asked.relations.heads or teacher.dimensions.heads) if asked.relations else 0
    of = asked.relations.of if asked.relations else ()
    return FeatureCase(
        pairs=len(hidden),
        teacher_layers=len({theirs for _, theirs in hidden}),
        relations=len(relations),
        vectors="".join(relation[0] for relation in of),
        heads=heads,
    )


def feature_bytes(student: ModelShape, teacher: ModelShape, case: StageMemoryCase) -> int:
    """Return the bytes that the terms add to a step: what is kept of both passes, the work of one term, and the projectors."""
    features = case.features
    if features is None:
        return 0
    theirs, ours = 4 if case.load_in == "fp32" else 2, 2 if case.mixed else 4
    # the student's layers keep their hidden states for the backward pass anyway, but the last one's; checkpointed ones do so too
    kept = case.tokens * (theirs * features.teacher_layers * teacher.hidden + (4 * student.hidden if features.pairs else 0))
    vectors = sum(theirs * _width(teacher, word) + ours * _width(student, word) for word in features.vectors)
    kept += case.tokens * features.relations * vectors
    work = _WORK * 4 * case.tokens * max(student.hidden, teacher.hidden) if features.pairs else 0
    work = max(work, _RELATIONS * 4 * features.heads * case.seq_length**2 if features.relations else 0)
    # weights, gradients and both moments, fp32, whole on every rank
    projectors = 16 * features.pairs * student.hidden * teacher.hidden if student.hidden != teacher.hidden else 0
    return kept + work + projectors


def _width(shape: ModelShape, word: str) -> int:
    sizes = shape.dimensions
    return (sizes.heads if word == "q" else sizes.kv_heads) * sizes.head_dim
