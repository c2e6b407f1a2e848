"""Checks across the sections of a recipe: teachers, training tokens, codes to export, widths that group sizes divide."""

from pathlib import Path

from ..losses.settings import LossSettings
from ..models.folder.codes_file import codes_file
from ..models.settings import MOST_TOP_K
from ..trainer.settings import EvaluateSettings, TrainingBlock
from ..trainer.settings_generation import GenerateSettings
from ..trainer.settings_own import OwnStageSettings
from ..trainer.stage_plan import NOTHING_MOVES, learns_from, moves_nothing, reads_text, trains
from .blend_checks import check_blend
from .draft import Draft, key_path
from .feature_checks import check_features
from .problems import Problems
from .recipe import StageEntry
from .sample_checks import check_samples
from .width_checks import check_kept, check_widths

_QUANTIZERS = ("qat", "quantize")
_WRITERS = ("pretrain", "distill", "prune", *_QUANTIZERS)


def check_draft(draft: Draft, problems: Problems) -> None:
    """Report every problem between the sections and stages that could be read."""
    # every check runs on what could be read: a section that is wrong is None, and its own problem is already known
    _check_start(draft, problems)
    check_blend(draft, problems)
    for entry in draft.stages:
        if entry is not None:
            _check_budget(entry, problems)
            _check_stage_teacher(entry, draft, problems)
            _check_watched(entry, draft, problems)
            check_samples(entry, draft, problems)
            check_features(entry, draft, problems)
    _check_parts(draft, problems)
    _check_batch(draft, problems)
    check_kept(draft, problems)
    check_widths(draft, problems)
    _check_exports(draft, problems)


def _check_start(draft: Draft, problems: Problems) -> None:
    """Check that student and teacher fit each other, and that the scratch teacher is a possible Llama."""
    if draft.student and draft.lacks_teacher:
        if draft.student.keep:
            problems.add(
                ("student", "keep"), "cuts the student from the teacher, but the recipe has no teacher; add one, or give student.path"
            )
        if draft.student.config is not None:
            problems.add(
                ("student", "config"), "takes its tokenizer from the teacher, but the recipe has no teacher; add one, or give student.path"
            )
    # hub_config alone would be read as a setting and have no effect
    if draft.data and draft.data.hub_config and not draft.data.hub:
        problems.add(("data", "hub_config"), "configures a hub dataset, and data.hub is not given; remove it, or give data.hub")
    _check_generate(draft, problems)
    scratch = draft.teacher.scratch if draft.teacher else None
    # a scratch teacher is trained on the run's text, so it needs some too
    if draft.data and draft.data.eval_tokens == "all" and (scratch or any(entry and reads_text(entry.settings) for entry in draft.stages)):
        problems.add(("data", "eval_tokens"), "is 'all', which leaves no text for the stages that need some; give a number, such as 32k")
    if scratch and draft.data and draft.data.has_chats:
        chat = next((index for index, part in enumerate(draft.data.blend or ()) if part.kind == "chat"), None)
        at = ("data", "kind") if chat is None else ("data", "blend", chat, "kind")
        problems.add(at, "is 'chat', and a scratch teacher's tokenizer has no chat template; give teacher.path")
    # a zero is out of bounds and reported as such; here it would be a division by zero
    if scratch and min(scratch.heads, scratch.kv_heads) >= 1:
        # the same two rules as transformers' Llama: a head has a whole width, and each key/value head serves a whole number of query heads
        if scratch.hidden % scratch.heads:
            problems.add(("teacher", "scratch", "heads"), f"{scratch.heads} does not divide hidden={scratch.hidden}; change one of them")
        if scratch.heads % scratch.kv_heads:
            problems.add(
                ("teacher", "scratch", "kv_heads"), f"{scratch.kv_heads} does not divide heads={scratch.heads}; change one of them"
            )


def _check_generate(draft: Draft, problems: Problems) -> None:
    """The models that write text have weights before there is any text, and they write more than is held out."""
    if draft.data is None:
        return
    trains = any(entry and reads_text(entry.settings) for entry in draft.stages)
    for index, text in enumerate(draft.data.texts.values()):
        asked, held = text.generate, text.eval_tokens
        if asked is None:
            continue
        at: tuple[str | int, ...] = ("data", "blend", index, "generate") if draft.data.blend else ("data", "generate")
        if isinstance(held, int) and asked.tokens <= held and trains:
            problems.add(
                (*at, "tokens"),
                f"{asked.tokens:,} leaves no text to train on beside data.eval_tokens={held:,}; write more, or hold out less",
            )
        _check_writer(asked, (*at, "model"), draft, problems)


def _check_writer(asked: GenerateSettings, at: tuple[str | int, ...], draft: Draft, problems: Problems) -> None:
    # with a teacher section that is wrong, nobody knows which model was meant to write
    if draft.student is None or not (draft.teacher or draft.lacks_teacher):
        return
    given = draft.student if asked.model == "student" else draft.teacher
    if given is not None and given.path:
        return
    if draft.teacher and draft.teacher.scratch:
        problems.add(at, "writes the text, and a scratch teacher is trained on it; give teacher.path, or data.files")
    elif asked.model == "student":
        problems.add(at, "is 'student', which is made from the teacher; give student.path, or let the teacher write (model: teacher)")
    elif draft.student.path:
        problems.add(at, "is 'teacher', and the recipe has none; add one (teacher: {path: ...}), or set model: student")
    else:
        problems.add(at, "is 'teacher', and the recipe has none; add one (teacher: {path: ...})")


def _check_budget(entry: StageEntry, problems: Problems) -> None:
    settings = entry.settings
    if entry.kind in ("pretrain", "distill", "qat") and settings.tokens is None and settings.steps is None:
        # the message of a budget stands at the stage, not at a key: neither of the two keys is there
        problems.add(key_path(entry), "trains, and needs 'tokens' or 'steps', such as tokens: 10M")


def _check_watched(entry: StageEntry, draft: Draft, problems: Problems) -> None:
    """Check that a stage whose evaluations decide what it ends with takes steps and is evaluated."""
    settings = entry.settings
    if not isinstance(settings, TrainingBlock) or not settings.selects:
        return
    key = "result" if settings.result == "best" else "early_stopping"
    if not trains(settings):
        # a stage that lacks its tokens by mistake has a problem of its own
        if entry.kind == "prune":
            problems.add(key_path(entry, key), "has no effect on a stage that takes no steps; give tokens or steps, or remove the key")
    elif draft.trainer and draft.trainer.evaluate_every == 0:
        problems.add(
            key_path(entry, key),
            "needs evaluations during the stage, and trainer.evaluate_every is 0; set it to auto or a number of steps, or remove the key",
        )


def _check_stage_teacher(entry: StageEntry, draft: Draft, problems: Problems) -> None:
    """Check that each stage that learns from a teacher, or is compared with one, has a teacher."""
    settings = entry.settings
    if isinstance(settings, EvaluateSettings) and draft.lacks_teacher:
        gates = [gate for gate in ("max_perplexity_increase", "max_kl", "min_top1", "min_task") if getattr(settings, gate) is not None]
        for gate in gates:
            problems.add(key_path(entry, gate), "compares with the teacher, but the recipe has no teacher; add one, or remove the gate")
    if not isinstance(settings, TrainingBlock):
        return
    if entry.kind == "pretrain":
        if settings.teacher is not None:
            problems.add(
                key_path(entry, "teacher"), "is not used: pretrain learns from the text alone; use a distill stage, or remove the key"
            )
        # the defaults are what a stage without the key has, and hard_weight=1 is what pretrain does anyway
        if settings.loss not in (LossSettings(), LossSettings(hard_weight=1.0)):
            problems.add(
                key_path(entry, "loss"), "is not used: pretrain always trains on cross-entropy; use a distill stage, or remove the key"
            )
    elif (draft.teacher or draft.lacks_teacher) and moves_nothing(settings, has_teacher=not draft.lacks_teacher):
        problems.add(key_path(entry, "movement"), NOTHING_MOVES)
    elif draft.lacks_teacher and learns_from(settings, has_teacher=False) is not None:
        if settings.teacher == "recipe":
            problems.add(key_path(entry, "teacher"), "is 'recipe', but the recipe has no teacher; add one, or set teacher: input")
        elif settings.teacher is None and entry.kind == "distill":
            remedy = "add one (teacher: {path: ...}), or train on the text alone with loss: {hard_weight: 1.0}"
            problems.add(key_path(entry), f"learns from a teacher, but the recipe has none; {remedy}")


def _check_parts(draft: Draft, problems: Problems) -> None:
    """Check that a cache or server, which gives a part of each distribution, is used only for forward KL, and that some stage reads it."""
    teacher = draft.teacher
    if teacher is None or not (teacher.cache or teacher.served):
        return
    source = "teacher.cache keeps" if teacher.cache else "teacher.served gives"
    # has_teacher=True: without a teacher the check has ended above
    readers = [entry for entry in draft.stages if entry and learns_from(entry.settings, has_teacher=True) == "recipe"]
    for entry in readers:
        loss = entry.settings.loss
        if loss.divergence != "forward_kl" and not (teacher.cache and teacher.cache.whole):
            problems.add(
                key_path(entry, "loss", "divergence"),
                f"{loss.divergence} needs the teacher's whole distribution, and {source} a part of it; use forward_kl, "
                + ("teacher.cache.mode: hidden, or remove teacher.cache" if teacher.cache else "or remove teacher.served"),
            )
        if teacher.served and loss.temperature != 1:
            problems.add(
                key_path(entry, "loss", "temperature"), "must be 1 with teacher.served: servers give log-probabilities at temperature 1"
            )
    # with a stage that could not be read, its kind and so its teacher are unknown
    if not readers and all(draft.stages):
        name = "cache" if teacher.cache else "served"
        problems.add(("teacher", name), "is not used: no stage learns from the recipe's teacher; remove it")
    # a cache that keeps more tokens than the server gives would be filled with nothing
    if teacher.cache and teacher.served and (teacher.cache.mode != "top_k" or (teacher.cache.tokens or MOST_TOP_K) > teacher.served.tokens):
        problems.add(
            ("teacher", "cache"),
            f"of a served teacher must be top_k with at most teacher.served.tokens={teacher.served.tokens} tokens: it has no more",
        )


def _check_batch(draft: Draft, problems: Problems) -> None:
    """Check that a global batch is a whole number of windows and of micro-batches."""
    trainer, data = draft.trainer, draft.data
    training = any(entry and trains(entry.settings) for entry in draft.stages) or (draft.teacher and draft.teacher.scratch)
    # without training the batch is not used, so it need not fit the windows
    if not (trainer and data and training):
        return
    batch, length = trainer.global_batch_tokens, data.seq_length
    # the recipe's own numbers alone: how many ranks share the windows is known only where it runs (``trainer/plan.py``)
    windows, rest = divmod(batch, length)
    if rest:
        # the nearest batches that are whole windows and whole micro-batches, below and above
        whole = max(1, trainer.micro_batch) if isinstance(trainer.micro_batch, int) else 1
        legal = [length * whole * count for count in (windows // whole, windows // whole + 1) if count]
        nearest = " or ".join(f"{tokens:,}" for tokens in legal)
        problems.add(
            ("trainer", "global_batch_tokens"),
            f"{batch:,} tokens are not a whole number of windows of data.seq_length={length:,}; use {nearest}",
        )
    elif isinstance(trainer.micro_batch, int) and trainer.micro_batch >= 1 and windows % trainer.micro_batch:
        # 1 is always a divisor, and micro_batch is larger here, so there is one below; above the whole batch there may be none
        legal = [count for count in range(1, windows + 1) if windows % count == 0]
        below, above = max(c for c in legal if c < trainer.micro_batch), min((c for c in legal if c > trainer.micro_batch), default=None)
        nearest = f"{below} or {above}" if above else f"{below}"
        problems.add(
            ("trainer", "micro_batch"),
            f"{trainer.micro_batch} does not divide the {windows:,} windows of an optimizer step "
            f"(global_batch_tokens={batch:,} / seq_length={length:,}); use {nearest}",
        )


def _check_exports(draft: Draft, problems: Problems) -> None:
    """Check that an export finds codes: the last stage that wrote a model, or the student's own folder, must be quantized."""
    writer: StageEntry | None = None
    for entry in draft.stages:
        # the unreadable stage may be the one that quantizes
        if entry is None:
            return
        # evaluate and export write no model, so the codes of an earlier stage are still the newest
        if entry.kind in _WRITERS or _makes_own_model(entry):
            writer = entry
        if entry.kind != "export" or (writer and writer.kind in _QUANTIZERS):
            continue
        if writer is None and _starts_quantized(draft):
            continue
        after = f"; the last stage before it, stages.{writer.index} ({writer.kind}), writes none" if writer else ""
        problems.add(
            key_path(entry),
            f"packs the codes that a 'qat' or 'quantize' stage writes, and never rounds{after}; put one of the two before it",
        )


def _makes_own_model(entry: StageEntry) -> bool:
    return isinstance(entry.settings, OwnStageSettings) and entry.settings.part.makes_model


def _starts_quantized(draft: Draft) -> bool:
    # a hub id finds no folder here: codes count only where they lie on this machine
    path = draft.student.path if draft.student else None
    return path is not None and codes_file(Path(path)) is not None
