"""Which evaluation of a stage was the best so far, and whether the stage has learned enough (``result: best``, ``early_stopping``).

Plain arithmetic on the held-out figures. The standing is saved in every checkpoint, so a resumed stage comes to the same decisions; the
first rank decides for all.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from ...models.common.terminal_text import counted
from ..plan import TrainingPlan

EVALUATIONS = 8
"""Approximate number of evaluations in a stage, without the one before its first step."""
_WORDS = {"kl": "KL", "loss": "loss"}


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The evaluations of a stage so far. Figures are in nats; smaller is better."""

    figure: str
    """kl = KL to the stage's teacher; loss = cross-entropy, where no KL is measured."""
    best_step: int
    best: float
    """The smallest figure so far, of the evaluation after ``best_step``."""
    last_step: int
    last: float | None
    """The newest figure; None if it was not finite."""
    mark: float
    """The figure that the next one must fall below, by ``min_change``, to count as better."""
    since: int = 0
    """Evaluations in a row that were not better."""
    ended: bool = False
    """Whether the stage ends here, before its last step."""

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def standing_from(data: Any) -> Standing | None:
    """Inverse of ``Standing.plain``; None for None, and for what a later version may have written in another form."""
    names = {field.name for field in fields(Standing)}
    if not isinstance(data, Mapping) or data.keys() != names:
        return None
    return Standing(**data)


def figure_of(figure: str, values: Mapping[str, float | None]) -> float | None:
    """The figure called ``figure`` of an evaluation, in nats; None if it was not finite."""
    if figure == "kl":
        return values.get("held_out_kl")
    perplexity = values.get("held_out_perplexity")
    return None if perplexity is None else math.log(perplexity)


def judged(before: Standing | None, step: int, figure: str, value: float | None, min_change: float) -> Standing | None:
    """The standing after one more evaluation; None while none had a finite figure.

    Args:
        before: The standing until then.
        step: The optimizer step after which the student was evaluated.
        figure: Name of the figure.
        value: The figure; None if it is not finite, which is never better.
        min_change: Share by which it must fall below ``mark`` to count as better.
    """
    if before is None:
        return None if value is None else Standing(figure=figure, best_step=step, best=value, last_step=step, last=value, mark=value)
    after = replace(before, last_step=step, last=value, since=before.since + 1)
    if value is None:
        return after
    # the lowest figure is the best by however little; only patience asks for a change that is worth waiting for
    if value < before.best:
        after = replace(after, best_step=step, best=value)
    if value < before.mark * (1 - min_change):
        after = replace(after, mark=value, since=0)
    return after


def ends_early(standing: Standing | None, plan: TrainingPlan) -> bool:
    """Whether patience has run out before the last step."""
    rule = plan.early_stopping
    if rule is None or standing is None or standing.last_step >= plan.total_steps:
        return False
    return standing.since >= rule.patience


def spread(total_steps: int, most: int) -> int:
    """Steps between at most ``most`` evaluations of a stage."""
    return -(-total_steps // min(most, total_steps))


def deciding_every(every: int | Literal["auto"], total_steps: int) -> int:
    """Steps between evaluations that decide what a stage ends with; ``every`` is not 0."""
    return spread(total_steps, EVALUATIONS) if every == "auto" else every


def never_acts(plan: TrainingPlan, every: int) -> list[str]:
    """What evaluations every ``every`` steps can never decide in a stage of this plan, one sentence each with the remedy."""
    steps = {*range(every, plan.total_steps, every), plan.total_steps}
    # those of the warm-up are not judged
    count = sum(step > plan.warmup_steps for step in steps)
    has = f"can never act: the stage has {counted(count, 'evaluation')}" + (" after its warm-up" if plan.warmup_steps >= min(steps) else "")
    remedy = "give it more steps, or lower trainer.evaluate_every"
    found = [f"result: best {has}; {remedy}"] if plan.result == "best" and count < 2 else []
    # the first evaluation sets the mark, and the last one comes when the stage ends anyway
    if plan.early_stopping and plan.early_stopping.patience > (most := max(0, count - 2)):
        lower = f"lower patience to at most {most}, " if most else ""
        found.append(f"early_stopping.patience {plan.early_stopping.patience} {has}; {lower}{remedy}")
    return found


def ending_words(standing: Standing, plan: TrainingPlan, rate: float) -> str:
    """Why a stage ends early, as a sentence's end.

    Args:
        standing: The standing at its end.
        plan: The plan of the stage.
        rate: Learning rate of the last step that was taken.
    """
    assert plan.early_stopping is not None
    rule = plan.early_stopping
    count = f"{standing.since} evaluation{'s' * (standing.since > 1)}"
    by = f" by {rule.min_change:.3g} of its value" if rule.min_change else ""
    # a rate that was still high is a reason to look again: the fall of the rate is what usually brings the last improvement
    high = f"; the learning rate was still at {rate / plan.learning_rate:.0%} of its peak" if rate > 0.5 * plan.learning_rate else ""
    return (
        f"ends early, after step {standing.last_step} of {plan.total_steps}: for {count} held-out {_WORDS[standing.figure]} did not "
        f"fall{by} (early_stopping.patience {rule.patience}){high}"
    )


def best_words(seen: Mapping[str, Any]) -> str:
    """Which evaluation was best, and what the model is made of, as a sentence without its subject; from ``facts``."""
    what = f"held-out {_WORDS.get(seen['figure'], seen['figure'])}"
    if seen["best_step"] == seen["last_step"]:
        return f"{what} was lowest after the last step ({seen['best']:.4g})"
    last = seen["last"]
    lower = (
        ""
        if last is None or not last > 0
        else f", {(last - seen['best']) / last:.1%} lower than after step {seen['last_step']} ({last:.4g})"
    )
    if seen["model_step"] == seen["best_step"]:
        made = f"the model is that of step {seen['model_step']} (result: best)"
    else:
        made = f"the model is that of step {seen['model_step']}; result: best would take the best"
    return f"{what} was lowest after step {seen['best_step']} ({seen['best']:.4g}){lower}; {made}"


def facts(standing: Standing, plan: TrainingPlan, model_step: int) -> dict[str, Any]:
    """What the record of a finished stage and the report say of its evaluations.

    Args:
        standing: The standing at its end.
        plan: The plan of the stage.
        model_step: The step whose weights the stage ends with.
    """
    return {
        "figure": standing.figure,
        "best_step": standing.best_step,
        "best": standing.best,
        "last_step": standing.last_step,
        "last": standing.last,
        "model_step": model_step,
        "total_steps": plan.total_steps,
        "evaluations_since_better": standing.since,
        "patience": plan.early_stopping.patience if plan.early_stopping else None,
        "ended_early": standing.ended,
    }
