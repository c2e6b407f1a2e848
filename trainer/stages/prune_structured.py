"""Structured half of stage `prune`: whole FFN channels in one shot, on calibration text."""

import time
from typing import TYPE_CHECKING, Any

from ...models.families import decoder_linears, family_of
from ...models.pruning.structured import alignment_hint, ffn_channel_scores, prune_ffn
from ..settings_pruning import PruneSettings
from .calibration import calibration_text
from .context import StageContext, StageResult
from .coverage import coverage_facts
from .saving import save_student
from .student_and_teacher import whole_student
from .zeros import input_zeros

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prune_structured(settings: PruneSettings, context: StageContext) -> StageResult:
    """Score channels on calibration text, cut the model to the best ones, and write it (rank 0)."""
    started = time.perf_counter()
    student = whole_student(context)
    # only for its check: refuses a record that names something other than linears
    input_zeros(context, student)
    touched = _ffn_linears(student)
    save_student(student, context, _prune(student, settings, context))
    covered = coverage_facts(context, "pruned channels of", touched)
    return StageResult(model=context.model, seconds=time.perf_counter() - started, facts=covered)


def _ffn_linears(student: "PreTrainedModel") -> list[str]:
    """Names of the linears whose channels structured pruning removes."""
    family = family_of(student)
    return [name for name in decoder_linears(student) if name.endswith((*family.ffn_in, family.ffn_out))]


def _prune(student: "PreTrainedModel", settings: PruneSettings, context: StageContext) -> dict[str, Any]:
    assert settings.structured is not None
    scores = ffn_channel_scores(student, calibration_text(context.run.data.train, settings.calibration_tokens, context.run.seed).batches)
    kept = prune_ffn(student, scores, settings.structured.ffn)
    # after the width was accepted; no hint for toy sizes, whose FFN is narrower than one group of 128
    if settings.structured.ffn > 128 and (hint := alignment_hint(settings.structured.ffn)):
        context.say(f"  {hint}")
    context.say(f"  kept {settings.structured.ffn} of {len(scores[0])} FFN channels in each of {len(scores)} layers")
    return {"kept": {"ffn": kept}}
