"""Checks of losses on hidden states and attention relations: whether the teacher's layers are there to be read."""

from ..trainer.settings import TrainingBlock
from ..trainer.stage_plan import learns_from, trains
from .draft import Draft, key_path
from .problems import Problems
from .recipe import StageEntry


def check_features(entry: StageEntry, draft: Draft, problems: Problems) -> None:
    """Report what keeps a stage from comparing with what is inside its teacher."""
    settings = entry.settings
    # of a pretrain stage, and of one without steps, the loss as a whole is judged elsewhere or has no effect
    if not isinstance(settings, TrainingBlock) or settings.loss.features is None or entry.kind == "pretrain":
        return
    at = key_path(entry, "loss", "features")
    if not trains(settings):
        if entry.kind == "prune":
            problems.add(at, "has no effect on a stage that takes no steps; give tokens or steps, or remove the key")
        return
    teacher = draft.teacher
    if teacher is not None and learns_from(settings, has_teacher=True) == "recipe":
        source = "cache" if teacher.cache else "served" if teacher.served else ""
        if source:
            what = "keeps what the teacher predicts" if source == "cache" else "gives what a server predicts"
            problems.add(
                at,
                f"compares with the teacher's layers, and teacher.{source} {what}; remove teacher.{source}, so that the teacher runs here, "
                "or remove features",
            )
    if draft.trainer and draft.trainer.compile:
        problems.add(
            ("trainer", "compile"),
            f"is true, and {entry.name} reads what layers compute (loss.features), which compiled layers do not show; set it to false, or "
            "remove features",
        )
