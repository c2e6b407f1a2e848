"""Stage `prune`: whole FFN channels in one shot, or single weights along a cubic schedule."""

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...models.families import decoder_linears
from ...models.pruning.magnitude import magnitude_masks
from ..loop.hooks import MaskHook
from ..settings_pruning import PruneSettings
from ..stage_plan import trains
from .context import StageContext, StageResult, Trained
from .coverage import check_coverage, coverage_facts
from .prune_structured import prune_structured
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
    if settings.structured:
        return prune_structured(settings, context)
    started = time.perf_counter()
    check_coverage(context, allow_partial=settings.allow_partial)
    student = whole_student(context)
    # only for its check: refuses a record that names something other than linears
    input_zeros(context, student)
    touched = list(decoder_linears(student))
    save_student(student, context, _prune_once(student, settings))
    covered = coverage_facts(context, "pruned among", touched)
    return StageResult(model=context.model, seconds=time.perf_counter() - started, facts=covered)


def _prune_once(student: "PreTrainedModel", settings: PruneSettings) -> dict[str, Any]:
    assert settings.magnitude is not None
    weights = {name: module.weight.data for name, module in decoder_linears(student).items()}
    # in place, on rank 0 alone: nothing is trained, so there are no moments to clear
    for name, mask in magnitude_masks(weights, settings.magnitude.keep, settings.magnitude.scope, None).items():
        weights[name].mul_(mask)
    return {"sparse": list(weights)}
