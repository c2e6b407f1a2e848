"""Stage `prune`: whole FFN channels in one shot, or single weights along a cubic schedule."""

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...models.families import decoder_linears, family_of
from ...models.pruning.magnitude import magnitude_masks
from ...models.pruning.structured import alignment_hint, ffn_channel_scores, prune_ffn
from ..loop.hooks import MaskHook
from ..settings_pruning import PruneSettings, StructuredSettings
from ..stage_plan import trains
from .calibration import calibration_text
from .context import StageContext, StageResult, Trained
from .coverage import check_coverage, coverage_facts
from .saving import save_student, save_trained
from .student_and_teacher import open_student, whole_student
from .training import train_student, training_plan
from .zeros import input_zeros

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train(settings: PruneSettings, context: StageContext) -> Trained | None:
    """Prune by magnitude along a schedule while training; None when the stage prunes in one shot."""
    if not trains(settings):
        return None
    assert settings.magnitude is not None
    check_coverage(context, allow_partial=settings.allow_partial)
    student = open_student(settings, context)
    modules = list(decoder_linears(student.model))
    plan = training_plan(settings, context, student)
    # it keeps earlier zeros too: they are the first that its masks exclude
    hook = MaskHook(modules, settings.magnitude, plan.total_steps)
    return train_student(student, settings, context, plan, hooks=[hook], facts={"sparse": modules})


def finish(settings: PruneSettings, context: StageContext, trained: Trained | None) -> StageResult:
    """Write the trained student, or prune in one shot and write the result (rank 0)."""
    if trained is not None:
        saved = save_trained(trained, context)
        return replace(saved, facts={**saved.facts, **coverage_facts(context, "pruned among", decoder_linears(trained.student))})
    started = time.perf_counter()
    if settings.magnitude:
        check_coverage(context, allow_partial=settings.allow_partial)
    student = whole_student(context)
    # only for its check: refuses a record that names something other than linears
    input_zeros(context, student)
    touched = _ffn_linears(student) if settings.structured else list(decoder_linears(student))
    facts = _prune_structured(student, settings, context) if settings.structured else _prune_once(student, settings)
    save_student(student, context, facts)
    covered = coverage_facts(context, "pruned channels of" if settings.structured else "pruned among", touched)
    return StageResult(model=context.model, seconds=time.perf_counter() - started, facts=covered)


def _ffn_linears(student: "PreTrainedModel") -> list[str]:
    """Names of the linears whose channels structured pruning removes."""
    family = family_of(student)
    return [name for name in decoder_linears(student) if name.endswith((*family.ffn_in, family.ffn_out))]


def _prune_structured(student: "PreTrainedModel", settings: PruneSettings, context: StageContext) -> dict[str, Any]:
    assert isinstance(settings.structured, StructuredSettings)
    scores = ffn_channel_scores(student, calibration_text(context.run.data.train, settings.calibration_tokens, context.run.seed).batches)
    kept = prune_ffn(student, scores, settings.structured.ffn)
    # after the width was accepted; no hint for toy sizes, whose FFN is narrower than one group of 128
    if settings.structured.ffn > 128 and (hint := alignment_hint(settings.structured.ffn)):
        context.say(f"  {hint}")
    context.say(f"  kept {settings.structured.ffn} of {len(scores[0])} FFN channels in each of {len(scores)} layers")
    return {"kept": {"ffn": kept}}


def _prune_once(student: "PreTrainedModel", settings: PruneSettings) -> dict[str, Any]:
    assert settings.magnitude is not None
    weights = {name: module.weight.data for name, module in decoder_linears(student).items()}
    # in place, on rank 0 alone: nothing is trained, so there are no moments to clear
    for name, mask in magnitude_masks(weights, settings.magnitude.keep, settings.magnitude.scope, None).items():
        weights[name].mul_(mask)
    return {"sparse": list(weights)}
