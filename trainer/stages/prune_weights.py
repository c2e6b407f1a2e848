"""The part of stage `prune` that sets single weights to zero: in one shot, or along a schedule while the student trains."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...models.calibration.error_report import error_lines
from ...models.common.errors import UserError
from ...models.families import decoder_linears
from ...models.folder.loading import load_model
from ...models.pruning.layerwise import OneShot, PrunedLayers, amount_of_work, prune_layers
from ...models.pruning.magnitude import magnitude_masks
from ...models.pruning.selection import exact_count, magnitude_pattern_mask
from ...models.pruning.stored_zeros import check_stored
from ..evaluation.figures import exact_products
from ..loop.hooks import MaskHook
from ..loop.movement import MovementHook
from ..progress import token_progress
from ..settings_pruning import PruneSettings
from ..settings_sparsity import MagnitudeSettings, WeightSettings
from ..stage_plan import NOTHING_MOVES, moves_nothing
from .calibration import text_record, told_text
from .context import StageContext, StageResult, Trained
from .coverage import check_coverage, coverage_facts
from .local_layers import distil_locally, told_locally
from .saving import save_student, save_trained
from .student_and_teacher import current_device, open_student, whole_student
from .training import train_student, training_plan
from .zeros import input_zeros

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# lines printed; the record has all notes
_NOTES_TOLD = 5


def train_masks(settings: PruneSettings, context: StageContext) -> Trained:
    """Prune along a schedule while training (all ranks)."""
    check_coverage(context, allow_partial=settings.allow_partial)
    if moves_nothing(settings, has_teacher=context.run.teacher is not None):
        raise UserError(f"{context.name}: {NOTHING_MOVES}")
    student = open_student(settings, context)
    linears = decoder_linears(student.model)
    assert settings.weights is not None
    _check_widths(settings.weights, linears)
    plan = training_plan(settings, context, student)
    # both keep earlier zeros too: they are the first that the masks exclude
    if settings.movement is not None:
        hook = MovementHook(linears, settings.movement, plan.total_steps)
    else:
        assert settings.magnitude is not None
        hook = MaskHook(linears, settings.magnitude, plan.total_steps)
    return train_student(student, settings, context, plan, hooks=[hook], facts={"sparse": list(linears)})


def finish_masks(settings: PruneSettings, context: StageContext, trained: Trained) -> StageResult:
    """Write the trained student (rank 0)."""
    linears = decoder_linears(trained.student)
    stored = _Stored(settings, linears)
    trained.facts["pruning"] = stored.record()
    saved = save_trained(trained, context, stored.check)
    context.say(f"  {stored.words()}")
    return replace(saved, facts={**saved.facts, **coverage_facts(context, "pruned among", linears)})


def prune_once(settings: PruneSettings, context: StageContext) -> StageResult:
    """Prune in one shot and write the result (rank 0)."""
    started = time.perf_counter()
    check_coverage(context, allow_partial=settings.allow_partial)
    if settings.magnitude is not None:
        student, kept, facts = whole_student(context), None, {}
        # only for its check: refuses a record that names something other than linears
        input_zeros(context, student)
        _by_magnitude(settings.magnitude, student)
    else:
        student, kept, facts = _on_text(settings, context)
    linears = decoder_linears(student)
    told: dict[str, Any] = {}
    if settings.local is not None:
        seen = settings.calibration_tokens if settings.calibrates else None
        told = told_locally(distil_locally(settings.local, context, student, None, list(linears), seen), context.say)
    stored = _Stored(settings, linears, kept)
    save_student(student, context, {"sparse": list(linears), "pruning": {**stored.record(), **facts}, **told}, stored.check)
    context.say(f"  {stored.words()}")
    covered = coverage_facts(context, "pruned among", linears)
    return StageResult(model=context.model, seconds=time.perf_counter() - started, facts={**covered, **told})


def _by_magnitude(magnitude: MagnitudeSettings, student: "PreTrainedModel") -> None:
    linears = decoder_linears(student)
    _check_widths(magnitude, linears)
    weights = {name: linear.weight.data for name, linear in linears.items()}
    # in place, on rank 0 alone: nothing is trained, so there are no moments to clear
    if magnitude.nm is not None:
        for name, weight in weights.items():
            weight.mul_(magnitude_pattern_mask(name, weight, magnitude.nm))
        return
    for name, mask in magnitude_masks(weights, magnitude.share, magnitude.scope, None).items():
        weights[name].mul_(mask)


def _on_text(settings: PruneSettings, context: StageContext) -> "tuple[PreTrainedModel, int, dict[str, Any]]":
    """Prune layer by layer on calibration text; returns the model, the weights that its masks keep, and facts of the record."""
    weights, method = settings.weights, settings.method
    assert weights is not None and settings.calibration_tokens is not None
    assert method in ("wanda", "sparsegpt")
    # in host memory: one layer at a time is on the device
    student = load_model(context.input, dtype=torch.float32, revision=context.input_revision)
    sparse = input_zeros(context, student)
    widths = {name: linear.in_features for name, linear in decoder_linears(student).items()}
    text = told_text(
        context,
        student,
        settings.calibration_tokens,
        method=method,
        widths=widths if settings.sparsegpt else None,
        otherwise="use prune.wanda" if settings.sparsegpt else "use prune.magnitude",
    )
    damping = {"damping": settings.sparsegpt.damping} if settings.sparsegpt else {}
    how = OneShot(method=method, keep=weights.share, pattern=weights.nm, **damping)
    device = current_device()
    total = amount_of_work(student, text)
    # no TF32 and no autocast, so that the same text gives the same sums whatever training used
    with token_progress(context.run.console, context.name, total, "layer tokens") as advance, exact_products(device.type):
        pruned = prune_layers(student, how, text, sparse=sparse, device=device, advance=advance)
    _tell(pruned, context)
    errors = {
        kind: {"linears": error.linears, "pruned": error.relative, "by_magnitude": error.relative_baseline}
        for kind, error in pruned.errors.items()
    }
    facts = {**damping, "calibration": text_record(text), "relative_error": errors, "notes": pruned.notes}
    return student, sum(pruned.kept.values()), facts


def _tell(pruned: PrunedLayers, context: StageContext) -> None:
    for line in error_lines(pruned.errors, True, "by magnitude"):
        context.say(f"    {line}")
    # a large model can have hundreds of notes; decoct.json has all of them
    for note in pruned.notes[:_NOTES_TOLD]:
        context.say(f"  {note}")
    if len(pruned.notes) > _NOTES_TOLD:
        context.say(f"  and {len(pruned.notes) - _NOTES_TOLD} more notes in decoct.json (pruning.notes)")


def _check_widths(weights: WeightSettings, linears: "Mapping[str, nn.Linear]") -> None:
    if weights.nm is not None:
        weights.nm.check_widths({name: linear.in_features for name, linear in linears.items()})


class _Stored:
    """What a stage claims of the zeros of its result, and what the written files hold.

    Args:
        settings: Settings of the stage.
        linears: The pruned linears in memory.
        kept: Weights that the masks keep; None = as many as the settings say.
    """

    def __init__(self, settings: PruneSettings, linears: "Mapping[str, nn.Linear]", kept: int | None = None) -> None:
        assert settings.weights is not None
        self._method, self._weights, self._linears = settings.method, settings.weights, linears
        # what is tied counts once
        sizes = list({id(linear.weight): linear.weight.numel() for linear in linears.values()}.values())
        self._total = sum(sizes)
        if kept is None:
            alone = settings.magnitude is None or settings.magnitude.scope == "layer"
            kept = sum(exact_count(self._weights.share, size) for size in (sizes if alone else [self._total]))
        self._kept = kept
        self._measured = 0.0

    def check(self, folder: Path) -> None:
        """Compare the written files with the claim."""
        self._measured = check_stored(folder, self._linears, self._kept, self._weights.nm)

    def record(self) -> dict[str, Any]:
        """The entry ``pruning`` of decoct.json."""
        nm = self._weights.nm
        what = {"keep": self._weights.share, **({"pattern": str(nm)} if nm else {})}
        return {"method": self._method, **what, "kept": self._kept, "of": self._total}

    def words(self) -> str:
        """What was measured."""
        nm = self._weights.nm
        how = f"{self._method} {nm}" if nm else self._method
        return f"{self._measured:.2%} of {self._total:,} weights are zero in the written files ({how})"
