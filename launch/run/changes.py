"""What a stage did to the held-out figures: the change against the model it began with, and a word when training made it worse."""

from typing import TYPE_CHECKING, Any

from ...trainer.settings import TrainingBlock

if TYPE_CHECKING:
    from ...configs.recipe import StageEntry

Row = dict[str, Any]
NOISE = 0.001
"""Relative rise of a figure that is no change: fp32 sums in another order move less, a training stage that works moves more."""
_ONLY_TRAIN = ("pretrain", "distill")
"""Stages that do nothing but train, so that what they end with is to be better than what they began with."""


def learns_from_teacher(entry: "StageEntry") -> bool:
    """Whether a stage trains on what the recipe's teacher predicts."""
    from ...configs.checks import trains

    settings = entry.settings
    if not isinstance(settings, TrainingBlock) or entry.kind == "pretrain" or settings.teacher == "input":
        return False
    return trains(entry) and settings.loss.hard_weight < 1


def change_between(before: Row | None, after: Row) -> dict[str, Any] | None:
    """``{since, perplexity, kl}``: name of the row before, relative change of the perplexity, difference of the KL in nats.

    None where one of the two was not measured; ``kl`` is None without a teacher.
    """
    if before is None or not before.get("eval") or not after.get("eval"):
        return None
    old, new = before["eval"], after["eval"]
    kl = None if old["kl"] is None or new["kl"] is None else new["kl"] - old["kl"]
    return {"since": before["name"], "perplexity": new["perplexity"] / old["perplexity"] - 1, "kl": kl}


def warning_of(entry: "StageEntry", before: Row | None, after: Row) -> str | None:
    """A sentence when a stage that only trains ends worse on held-out text than it began; None when it does not, or nothing is known.

    Judged is what the stage learns: the KL to the recipe's teacher, or the perplexity where it learns from the text.
    """
    if entry.kind not in _ONLY_TRAIN or before is None or not before.get("eval") or not after.get("eval"):
        return None
    old, new = before["eval"], after["eval"]
    figure = "kl" if learns_from_teacher(entry) and old["kl"] is not None and new["kl"] is not None else "perplexity"
    if not new[figure] > old[figure] * (1 + NOISE):
        return None
    words = {"kl": "KL to the teacher", "perplexity": "perplexity"}[figure]
    return (
        f"{entry.name} ends worse on held-out text than it began: {words} {old[figure]:.4g} -> {new[figure]:.4g} ({before['name']} -> "
        f"{entry.name}). Give it more tokens, a lower peak rate (stages.{entry.index}.learning_rate) or a longer warm-up "
        f"(stages.{entry.index}.warmup), or leave the stage out"
    )
