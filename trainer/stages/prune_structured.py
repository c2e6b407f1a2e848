"""Structured half of stage `prune`: channels, heads, hidden width and depth in one shot, on calibration text."""

import time
from collections.abc import Mapping
from typing import Any

from ...models.axis_map import Axis, Family, check_map
from ...models.capabilities import percent
from ...models.family_map import family_of
from ...models.folder.loading import load_config
from ...models.pruning.parent_outputs import ParentOutputs
from ...models.pruning.repair import Repair, cut_and_repair
from ...models.pruning.shape_choice import select
from ...models.pruning.structured import cut
from ...models.pruning.zeros_record import of_kept_layers
from ...models.shape_advice import alignment_advice, server_advice
from ...models.sizes import WORDS, Sizes, sizes_of, target_sizes
from ..settings_pruning import PruneSettings
from .calibration import BATCH_TOKENS, calibration_text
from .context import StageContext, StageResult
from .local_layers import distil_locally, split_text, told_locally
from .saving import CARRIED, save_student
from .student_and_teacher import whole_student
from .zeros import input_zeros


def prune_structured(settings: PruneSettings, context: StageContext) -> StageResult:
    """Score what can be cut on calibration text, cut the model to the best of it, and write it (rank 0)."""
    started = time.perf_counter()
    assert settings.structured is not None and settings.calibration_tokens is not None
    # its refusals, before the weights are read
    config = load_config(context.input, revision=context.input_revision)
    family = family_of(config)
    after = target_sizes(config, family, settings.structured.kept)
    before = sizes_of(config, family)
    student = whole_student(context)
    check_map(family, student.state_dict())
    # only for its check: refuses a record that names something other than linears
    zeros = input_zeros(context, student)
    matrices = {name: parameter.numel() for name, parameter in student.named_parameters() if parameter.ndim > 1}
    touched = family.cut_share(matrices, settings.structured.kept)
    text = calibration_text(context.run.data.train, settings.calibration_tokens, context.run.seed).batches
    kept = select(
        student,
        text,
        settings.structured.kept,
        score=settings.structured.score or "weight_activation",
        depth_score=settings.structured.depth_score or "block_influence",
        tell=context.say,
    )
    repairs: list[Repair] = []
    local = settings.local
    carried = of_kept_layers(zeros, family, kept.layers)
    # of the parent, which is emptied when it is cut
    judge = None if local is None else ParentOutputs(student, split_text(context, local.tokens, settings.calibration_tokens)[1])
    if settings.structured.repair:
        fit, held_out = split_text(context, settings.calibration_tokens, step=BATCH_TOKENS)
        student, repairs = cut_and_repair(student, kept, fit, held_out, leave=zeros, judge=judge, tell=context.say)
        refitted = [name for name, cut_along in ((family.ffn_out, kept.ffn), (family.attention_out, kept.heads)) if cut_along is not None]
        if left := [name for name in zeros if name.endswith(tuple(refitted))]:
            context.say(f"  {len(left)} output projections have zeros that stay, and are not refitted")
    else:
        student = cut(student, kept, release=True)
    _tell(context, family, settings.structured.kept, before, after)
    told: dict[str, Any] = {"repairs": [repair.record() for repair in repairs]} if repairs else {}
    if local is not None and judge is not None:
        start = judge.kl(student)
        told |= told_locally(distil_locally(local, context, student, kept, carried, settings.calibration_tokens), context.say)
        told |= _kl(repairs, start, judge.kl(student), context)
    facts = {
        "kept": kept.record(family, before.layers),
        "parent_shape": before.record(),
        CARRIED: carried,
        **told,
    }
    save_student(student, context, facts)
    context.say(f"  cut {percent(touched)} of the decoder's weights along {_list(settings.structured.kept)}")
    coverage = {"share": touched, "left": {}}
    return StageResult(model=context.model, seconds=time.perf_counter() - started, facts={"coverage": coverage, **told})


def _kl(repairs: list[Repair], start: float, end: float, context: StageContext) -> dict[str, Any]:
    """KL from the parent, in nats per token of the held-out windows, as cut, repaired and after local distillation: told, and as a fact."""
    found = {"cut": repairs[0].before if repairs else start, **({"repaired": start} if repairs else {}), "local": end}
    words = {"cut": "as cut", "repaired": "after repairs", "local": "after local distillation"}
    context.say(f"  KL from the parent on held-out windows: {', '.join(f'{kl:.4f} {words[name]}' for name, kl in found.items())}")
    if end > start:
        context.say("  local distillation made the whole model worse: leave 'local' out, or give it more tokens")
    return {"local_kl": found}


def _tell(context: StageContext, family: Family, kept: Mapping[Axis, int], before: Sizes, after: Sizes) -> None:
    for axis in ("layers", "hidden", "ffn", "heads", "kv_heads"):
        if after.of(axis) < before.of(axis):
            each = "" if axis in ("layers", "hidden") else f" in each of {after.layers} layers"
            context.say(f"  kept {after.of(axis):,} of {before.of(axis):,} {WORDS[axis]}{each}")
    for line in (*alignment_advice(after, kept), *server_advice(family, after)):
        context.say(f"  {line}")


def _list(names: Mapping[Axis, int]) -> str:
    words = [WORDS[axis] for axis in names]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
