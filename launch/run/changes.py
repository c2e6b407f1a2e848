"""What a stage did to the held-out figures: the change since the model that it started from, and a warning if training made it worse."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...trainer.evaluation.spread import is_clear, paired_error
from ...trainer.stage_plan import learns_from

if TYPE_CHECKING:
    from ...configs.recipe import StageEntry

Row = dict[str, Any]
NOISE = 0.001
"""Relative rise that does not count as a change: reordered fp32 sums differ by less, a working training stage changes more."""
_ONLY_TRAIN = ("pretrain", "distill")
"""Kinds of stages that only train, so that their result should be better than their input."""


def learns_from_teacher(entry: "StageEntry") -> bool:
    """Return whether a stage trains on the predictions of the recipe's teacher."""
    return learns_from(entry.settings, has_teacher=True) == "recipe"


def change_between(before: Row | None, after: Row) -> dict[str, Any] | None:
    """Return ``{since, perplexity, perplexity_se, kl, kl_se}``: name of the row before, relative change of the perplexity, difference of
    the KL in nats, and their standard errors over the blocks that both rows were measured on.

    Returns None if one of the two rows was not measured. ``kl`` is None without a teacher; errors are None if rows share no blocks.
    """
    if before is None or not before.get("eval") or not after.get("eval"):
        return None
    old, new = before["eval"], after["eval"]
    # a KL of zero has no useful ratio, so it is a difference; perplexities of different models compare by their ratio
    kl = None if old["kl"] is None or new["kl"] is None else new["kl"] - old["kl"]
    ratio = new["perplexity"] / old["perplexity"]
    error = paired_error(before.get("blocks"), after.get("blocks"), "nll")
    return {
        "since": before["name"],
        "perplexity": ratio - 1,
        # the ratio is exp of the difference of the means
        "perplexity_se": None if error is None else ratio * error,
        "kl": kl,
        "kl_se": None if kl is None else paired_error(before.get("blocks"), after.get("blocks"), "kl"),
    }


def warning_of(entry: "StageEntry", before: Row | None, after: Row, curve: Sequence[Row] = ()) -> str | None:
    """Return a sentence if training made the model worse on held-out text; None if it did not, or if that is not known.

    The figure is what the stage learns: the KL to the teacher, or the perplexity if it learns from the text. A stage that only trains is
    compared with the row before it. A stage that trains rounded weights is compared with the same weights, rounded but not yet trained.

    Args:
        curve: the stage's lines of metrics.jsonl.
    """
    # pruning and rounding are expected to cost quality, so only stages that do nothing but train are held against the row before
    if entry.kind in _ONLY_TRAIN and before is not None and before.get("eval") and after.get("eval"):
        old, new = before["eval"], after["eval"]
        kl = learns_from_teacher(entry) and old["kl"] is not None and new["kl"] is not None
        between = f"{before['name']} -> {entry.name}"
        figure = "kl" if kl else "perplexity"
        change = change_between(before, after)
        if change and is_clear(change[figure], change[f"{figure}_se"]) is False:
            return None
        return _worse(entry, figure, old[figure], new[figure], between)
    # with a delay or an annealed width the first evaluation measures other weights than the last, so the two are not compared
    if entry.kind == "qat" and entry.settings.delay == 0 and entry.settings.anneal_from is None:
        # the KL decides where there is a teacher; without one its column is empty and the perplexity decides
        for figure in ("kl", "perplexity"):
            seen = [line[f"held_out_{figure}"] for line in curve if line.get(f"held_out_{figure}") is not None]
            if len(seen) > 1:
                # the weights that the stage ends with
                end = min(seen[1:]) if entry.settings.result == "best" else seen[-1]
                return _worse(entry, figure, seen[0], end, "rounded weights before and after training, on a part of the held-out text")
    return None


def _worse(entry: "StageEntry", figure: str, old: float, new: float, between: str) -> str | None:
    # written with "not", so that NaN counts as worse
    if not new > old * (1 + NOISE):
        return None
    words = {"kl": "KL to the teacher", "perplexity": "perplexity"}[figure]
    return (
        f"{entry.name} ends worse on held-out text than it began: {words} {old:.4g} -> {new:.4g} ({between}). Give it more tokens, a lower "
        f"peak rate (stages.{entry.index}.learning_rate) or a longer warm-up (stages.{entry.index}.warmup), or leave the stage out"
    )
