"""Structured half of stage `prune`: channels, heads, hidden width and depth in one shot, on calibration text."""

import time
from collections.abc import Mapping
from typing import Any

from ...models.axis_map import WIDTHS, Axis, Family, check_map
from ...models.capabilities import percent
from ...models.family_map import family_of
from ...models.folder.loading import find_model_folder, load_config
from ...models.folder.model_folder import read_record
from ...models.pruning.kept_record import ROOT, root_record
from ...models.pruning.parent_outputs import ParentOutputs
from ...models.pruning.repair import Repair, cut_and_repair, refitted
from ...models.pruning.shape_choice import selected
from ...models.pruning.structured import cut
from ...models.pruning.zeros_record import of_kept_layers
from ...models.shape_advice import alignment_advice, server_advice
from ...models.sizes import WORDS, Sizes, sizes_of, target_sizes
from ..settings_pruning import PruneSettings
from .calibration import BATCH_TOKENS, calibration_text
from .context import StageContext, StageResult
from .local_layers import distil_locally, split_text, told_locally
from .saving import CARRIED, save_student
from .score_caches import score_cache, shape_space, tell_scores
from .shape_search import find_shape
from .student_and_teacher import whole_student
from .zeros import input_zeros


def prune_structured(settings: PruneSettings, context: StageContext) -> StageResult:
    """Score what can be cut on calibration text, cut the model to the best of it, and write it (rank 0)."""
    started = time.perf_counter()
    assert settings.structured is not None and settings.calibration_tokens is not None
    # its refusals, before the weights are read
    config = load_config(context.input, revision=context.input_revision)
    family = family_of(config)
    structured, asked = settings.structured, settings.structured.kept
    before = sizes_of(config, family)
    space = None if structured.budget is None else shape_space(config, structured)
    if space is None:
        target_sizes(config, family, asked)
    else:
        _ = space.shapes
    student = whole_student(context)
    check_map(family, student.state_dict())
    # only for its check: refuses a record that names something other than linears
    zeros = input_zeros(context, student)
    matrices = {name: parameter.numel() for name, parameter in student.named_parameters() if parameter.ndim > 1}
    text = calibration_text(context.run.data.train, settings.calibration_tokens, context.run.seed).batches
    cache = score_cache(context, student, text)
    score = structured.score or "weight_activation"
    found: dict[str, Any] = {}
    if space is not None:
        searched = find_shape(settings, context, space, cache, text)
        asked, found = searched.kept, {"search": searched.facts}
    after = target_sizes(config, family, asked)
    touched = family.cut_share(matrices, asked)
    fit, held_out = split_text(context, settings.calibration_tokens, step=BATCH_TOKENS) if structured.repair else ([], [])
    # the repairs are fitted on the text of the scores, unless there is too little: then one pass gives both
    same = sum(map(len, (batch["input_ids"] for batch in fit))) == sum(map(len, (batch["input_ids"] for batch in text)))
    wanted = [name for name in refitted(family, asked, before.layers) if name not in zeros] if structured.repair else []
    if any(axis in asked for axis in WIDTHS):
        cache.prepare(score, wanted if same else ())
    kept = selected(cache, asked, score=score, depth_score=structured.depth_score or "block_influence")
    tell_scores(cache, context)
    repairs: list[Repair] = []
    carried = of_kept_layers(zeros, family, kept.layers)
    local = settings.local
    # of the parent, which is emptied when it is cut
    judge = None if local is None else ParentOutputs(student, split_text(context, local.tokens, settings.calibration_tokens)[1])
    if structured.repair:
        grams = (cache if same else score_cache(context, student, fit)).grams
        student, repairs = cut_and_repair(student, kept, fit, held_out, leave=zeros, grams=grams, judge=judge, tell=context.say)
        if left := set(refitted(family, asked, before.layers)) & set(zeros):
            context.say(f"  {len(left)} output projections have zeros that stay, and are not refitted")
    else:
        student = cut(student, kept, release=True)
    _tell(context, family, asked, before, after)
    told: dict[str, Any] = {"repairs": [repair.record() for repair in repairs]} if repairs else {}
    if local is not None and judge is not None:
        start = judge.kl(student)
        told |= told_locally(distil_locally(local, context, student, kept, carried, settings.calibration_tokens), context.say)
        told |= _kl(repairs, start, judge.kl(student), context)
    facts = {
        "kept": kept.record(family, before.layers),
        "parent_shape": before.record(),
        ROOT: root_record(read_record(find_model_folder(context.input, context.input_revision, weights=False)), family, before, kept),
        "repairs": [repair.record() for repair in repairs],
        CARRIED: carried,
        **told,
    }
    save_student(student, context, facts)
    context.say(f"  cut {percent(touched)} of the decoder's weights along {_list(asked)}")
    told |= found
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
