"""Checks of stages that train on samples: whether their models, their text and their loss allow it."""

from ..trainer.settings import TrainingBlock
from ..trainer.stage_plan import learns_from, trains
from .draft import Draft, key_path
from .problems import Problems
from .recipe import StageEntry


def check_samples(entry: StageEntry, draft: Draft, problems: Problems) -> None:
    """Report what keeps a stage from training on samples."""
    settings = entry.settings
    asked = settings.samples if isinstance(settings, TrainingBlock) else None
    if asked is None:
        return
    at = key_path(entry, "samples")
    if entry.kind == "pretrain":
        problems.add(at, "is not used: pretrain learns from the text alone; use a distill stage, or remove the key")
        return
    if not trains(settings):
        # a stage that lacks its tokens by mistake has a problem of its own
        if entry.kind == "prune":
            problems.add(at, "has no effect on a stage that takes no steps; give tokens or steps, or remove the key")
        return
    loss = settings.loss
    if loss.hard_weight == 1.0:
        problems.add(
            at,
            "needs a teacher to learn from, and loss.hard_weight is 1; lower it. To train on text of the teacher alone, let it write the "
            "data (data.generate)",
        )
    elif loss.hard_weight and asked.by_student:
        problems.add(
            (*at, "from"),
            f"is '{asked.from_}', and loss.hard_weight={loss.hard_weight:g} would teach the student its own samples as labels; set "
            "loss.hard_weight: 0, or from: teacher",
        )
    _check_teacher(entry, draft, problems)
    if draft.trainer and draft.trainer.strategy in ("fsdp2", "hsdp"):
        problems.add(
            ("trainer", "strategy"),
            f"is {draft.trainer.strategy}, and {entry.name} draws samples with the whole student on each rank, each rank its own "
            "number of tokens; set it to ddp (or auto), or remove samples",
        )
    if draft.trainer and draft.trainer.compile:
        problems.add(
            ("trainer", "compile"),
            f"is true, and {entry.name} draws samples, whose lengths would be compiled one after the other; set it to false, or remove "
            "samples",
        )
    _check_text(entry, draft, problems)


def _check_teacher(entry: StageEntry, draft: Draft, problems: Problems) -> None:
    """A cache and a server know the given text alone, and a sharded teacher computes in step on all ranks."""
    teacher, asked = draft.teacher, entry.settings.samples
    if teacher is None or learns_from(entry.settings, has_teacher=True) != "recipe":
        return
    source = "cache" if teacher.cache else "served" if teacher.served else ""
    if source:
        problems.add(
            key_path(entry, "samples"),
            f"is new text, for which teacher.{source} has no predictions; remove teacher.{source}, so that the teacher runs here, or "
            "remove samples",
        )
    elif asked.by_teacher and teacher.placement == "sharded":
        problems.add(
            ("teacher", "placement"),
            f"is sharded, and in {entry.name} each rank lets the teacher write its own number of tokens (samples.from: {asked.from_}), "
            "while a sharded teacher computes in step on all ranks; set it to replicated or offloaded, or set samples.from: student",
        )


def _check_text(entry: StageEntry, draft: Draft, problems: Problems) -> None:
    """Prompt and completion fit into a window, and the beginnings of answers are known."""
    data, asked = draft.data, entry.settings.samples
    if data is None:
        return
    kinds = {text.kind for text in data.texts.values()}
    if len(kinds) > 1:
        problems.add(
            key_path(entry, "samples"),
            "goes on from answers in conversations and from beginnings in documents, and data.blend has parts of both kinds; give all "
            "parts the same kind, or remove samples",
        )
        return
    chat = data.has_chats
    # what stands before an answer has its own length; at least one token of it is there
    prompts = 1 if chat else asked.prompts
    if prompts + asked.max_new_tokens > data.seq_length:
        given = "" if chat else f"{prompts:,} tokens of prompt (prompts) and "
        problems.add(
            key_path(entry, "samples", "max_new_tokens"),
            f"{given}{asked.max_new_tokens:,} new tokens do not fit into a window of data.seq_length={data.seq_length:,}; lower "
            f"{'it' if chat else 'one of them'}, or raise data.seq_length",
        )
    if chat and not all(text.mask_prompts for text in data.texts.values()):
        problems.add(
            key_path(entry, "samples"),
            "continues conversations at the assistant's answers, and data.mask_prompts=false marks none; remove one of the two keys",
        )
