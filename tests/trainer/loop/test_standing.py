"""Which evaluation is the best, when patience runs out, and how both are told; on figures made up here."""

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from decoct.trainer.loop.standing import Standing, best_words, ending_words, ends_early, facts, figure_of, judged, never_acts, standing_from
from decoct.trainer.plan import BatchPlan, TrainingPlan
from decoct.trainer.settings_watching import EarlyStoppingSettings


def _plan(patience: int = 0, change: float = 0.0, **more: Any) -> TrainingPlan:
    rule = EarlyStoppingSettings(patience=patience, min_change=change) if patience else None
    return TrainingPlan(
        total_steps=100, batch=BatchPlan(global_windows=1, micro_batch=1, accumulation=1), learning_rate=1e-3, early_stopping=rule, **more
    )


def _after(values: Sequence[float | None], change: float = 0.0) -> Standing | None:
    standing = None
    for number, value in enumerate(values, 1):
        standing = judged(standing, 10 * number, "kl", value, change)
    return standing


@pytest.mark.parametrize(
    ("values", "change", "best_step", "since"),
    [
        ([3.0, 2.0, 1.0], 0.0, 30, 0),
        ([3.0, 1.0, 2.0, 1.5], 0.0, 20, 2),
        ([1.0, 1.0, 1.0], 0.0, 10, 2),  # the first of equals
        ([1.0, 0.99, 0.98, 0.97], 0.05, 40, 3),  # better each time, but never by as much as asked for
        ([1.0, 0.98, 0.96, 0.94], 0.05, 40, 0),  # small steps add up
        ([None, 2.0, None, 3.0], 0.0, 20, 2),  # what is not finite is never better
    ],
)
def test_best_and_patience(values: list[float | None], change: float, best_step: int, since: int) -> None:
    standing = _after(values, change)
    assert standing is not None
    assert (standing.best_step, standing.since) == (best_step, since)
    assert (standing.last_step, standing.last) == (10 * len(values), values[-1])
    assert standing.best == min(value for value in values if value is not None)


def test_nothing_stands_before_a_finite_figure() -> None:
    assert _after([None, None]) is None
    assert not ends_early(None, _plan(1))


def test_patience_ends_a_stage_before_its_last_step_alone() -> None:
    values = [1.0, 2.0, 2.0]
    assert ends_early(_after(values), _plan(2))
    assert not ends_early(_after(values), _plan(3))
    assert not ends_early(_after(values), _plan())
    assert not ends_early(_after([1.0, *[2.0] * 9]), _plan(2)), "step 100 is the last one anyway"


@pytest.mark.parametrize("every", [1, 7, 10, 30, 50, 99, 100, 1000])
@pytest.mark.parametrize("patience", [1, 2, 3, 8, 9, 10])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
def test_what_can_never_act_is_what_no_figures_make_act(every: int, patience: int, warmup: float) -> None:
    plan = _plan(patience, result="best", warmup=warmup)
    standing, ended, counts = None, False, 0
    for step in range(1, 101):
        if (step % every == 0 or step == 100) and step > plan.warmup_steps:
            # figures that only get worse: nothing ends a stage sooner
            standing, counts = judged(standing, step, "kl", float(step), 0.0), counts + 1
            ended = ended or ends_early(standing, plan)
    told = never_acts(plan, every)
    assert any("early_stopping" in one for one in told) is not ended
    assert any("result: best" in one for one in told) is (counts < 2)
    assert all(f"the stage has {counts} evaluation" in one for one in told)
    assert never_acts(_plan(warmup=warmup), every) == []


def test_the_words_of_what_can_never_act() -> None:
    remedy = "give it more steps, or lower trainer.evaluate_every"
    assert never_acts(_plan(9, result="best", warmup=0.1), 1000) == [
        f"result: best can never act: the stage has 1 evaluation; {remedy}",
        f"early_stopping.patience 9 can never act: the stage has 1 evaluation; {remedy}",
    ]
    assert never_acts(_plan(9, warmup=0.1), 10) == [
        f"early_stopping.patience 9 can never act: the stage has 9 evaluations after its warm-up; lower patience to at most 7, {remedy}"
    ]


def test_a_standing_comes_back_from_json_and_others_do_not() -> None:
    standing = _after([3.0, None])
    assert standing is not None
    assert standing_from(json.loads(json.dumps(standing.plain()))) == standing
    assert standing_from(None) is None
    assert standing_from({"best": 1.0}) is None


def test_the_figure_is_the_kl_or_the_cross_entropy() -> None:
    values = {"held_out_kl": 0.5, "held_out_perplexity": math.exp(2.0)}
    assert figure_of("kl", values) == 0.5
    assert figure_of("loss", values) == pytest.approx(2.0)
    assert figure_of("loss", {"held_out_kl": 0.5, "held_out_perplexity": None}) is None


def test_what_is_said() -> None:
    standing = _after([0.5, 0.4, 0.5])
    assert standing is not None
    assert best_words(facts(standing, _plan(), 30)) == (
        "held-out KL was lowest after step 20 (0.4), 20.0% lower than after step 30 (0.5); the model is that of step 30; result: best "
        "would take the best"
    )
    assert best_words(facts(standing, _plan(), 20)).endswith("; the model is that of step 20 (result: best)")
    last = _after([0.5, 0.4])
    assert last is not None
    assert best_words(facts(last, _plan(), 20)) == "held-out KL was lowest after the last step (0.4)"
    assert ending_words(standing, _plan(1, 0.01), 9e-4) == (
        "ends early, after step 30 of 100: for 1 evaluation held-out KL did not fall by 0.01 of its value (early_stopping.patience 1); the "
        "learning rate was still at 90% of its peak"
    )
    assert ending_words(standing, _plan(1), 1e-4).endswith("held-out KL did not fall (early_stopping.patience 1)")


def test_the_plan_of_before_continues() -> None:
    """A checkpoint of a version without these settings belongs to the plan at their defaults."""
    assert not {"result", "early_stopping"} & _plan().identity().keys()
    assert _plan(2, result="best").identity()["early_stopping"] == {"patience": 2, "min_change": 0.0}
    assert _plan(2, result="best").identity()["result"] == "best"
