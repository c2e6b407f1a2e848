"""What a stage did to the held-out figures, and when that is worth a warning."""

from typing import Any

import pytest

from decoct.configs import recipe_from_dict
from decoct.launch.run.changes import change_between, learns_from_teacher, warning_of


def row(name: str, perplexity: float, kl: float | None = None) -> dict[str, Any]:
    return {"name": name, "eval": {"perplexity": perplexity, "kl": kl}}


def entry(stage: dict[str, Any], teacher: bool = True) -> Any:
    recipe = {"name": "x", "student": {"path": "s"}, "data": {"builtin": "python-stdlib"}, "stages": [stage]}
    return recipe_from_dict({**recipe, "teacher": {"path": "t"}} if teacher else recipe).stages[0]


UNKNOWN = {"perplexity_se": None, "kl_se": None}
DISTILL = {"distill": {"tokens": "1M"}}


def test_change_is_relative_to_the_row_before() -> None:
    assert change_between(row("a", 10.0, 0.5), row("b", 9.0, 0.25)) == {
        "since": "a",
        "perplexity": pytest.approx(-0.1),
        "kl": -0.25,
        **UNKNOWN,
    }
    assert change_between(row("a", 10.0), row("b", 9.0, 0.25)) == {"since": "a", "perplexity": pytest.approx(-0.1), "kl": None, **UNKNOWN}
    assert change_between(None, row("b", 9.0)) is None
    assert change_between(row("a", 10.0), {"name": "b", "eval": None}) is None


def test_a_distillation_that_ends_with_more_kl_is_told_with_both_figures_and_remedies() -> None:
    said = warning_of(entry(DISTILL), row("00-student", 100.0, 0.0400), row("01-distill", 99.0, 0.0412)) or ""
    assert "01-distill ends worse on held-out text than it began: KL to the teacher 0.04 -> 0.0412 (00-student -> 01-distill)" in said
    assert "stages.0.learning_rate" in said


def in_blocks(name: str, kl: float, sums: list[float]) -> dict[str, Any]:
    return {**row(name, 100.0, kl), "blocks": {"tokens": [1.0] * 4, "nll": [4.6] * 4, "kl": sums}}


def test_change_has_the_error_of_the_difference_on_the_same_blocks() -> None:
    change = change_between(in_blocks("a", 0.25, [0.1, 0.2, 0.3, 0.4]), in_blocks("b", 0.30, [0.16, 0.24, 0.36, 0.44])) or {}
    assert change["kl_se"] == pytest.approx(0.0115470 / 2, rel=1e-3)
    assert change["perplexity_se"] == 0


def test_a_rise_that_chance_explains_is_not_told() -> None:
    before = in_blocks("00-student", 0.25, [0.1, 0.2, 0.3, 0.4])
    worse = in_blocks("01-distill", 0.30, [0.16, 0.24, 0.36, 0.44])
    chance = in_blocks("01-distill", 0.30, [0.5, 0.0, 0.6, 0.1])
    assert warning_of(entry(DISTILL), before, worse)
    assert warning_of(entry(DISTILL), before, chance) is None


@pytest.mark.parametrize(
    ("stage", "before", "after", "told"),
    [
        (DISTILL, (100.0, 0.04), (120.0, 0.03), False),  # it learns the teacher, and is nearer to it
        (DISTILL, (100.0, 0.04), (100.0, 0.04001), False),  # no change
        ({"distill": {"tokens": "1M", "loss": {"hard_weight": 1.0}}}, (100.0, 0.04), (120.0, 0.03), True),  # it learns the text
        ({"distill": {"tokens": "1M", "teacher": "input"}}, (100.0, 0.04), (99.0, 0.05), False),  # another teacher than the figure's
        ({"pretrain": {"tokens": "1M"}}, (100.0, 0.04), (99.0, 0.05), False),
        ({"pretrain": {"tokens": "1M"}}, (100.0, None), (101.0, None), True),
        ({"qat": {"tokens": "1M"}}, (100.0, 0.04), (120.0, 0.3), False),  # rounding costs something
    ],
)
def test_judged_is_what_a_stage_learns(stage: Any, before: Any, after: Any, told: bool) -> None:
    assert bool(warning_of(entry(stage), row("a", *before), row("b", *after))) == told


@pytest.mark.parametrize(
    ("settings", "seen", "told"),
    [
        ({}, [0.04, 0.03, 0.05], True),
        ({}, [0.04, 0.06, 0.03], False),
        ({"delay": 0.2}, [0.04, 0.03, 0.05], False),  # it began without rounding
        ({"anneal_from": 8}, [0.04, 0.03, 0.05], False),  # it began with more bits
        ({}, [], False),
    ],
)
def test_training_of_rounded_weights_is_held_against_the_same_weights_untrained(settings: Any, seen: list[float], told: bool) -> None:
    curve = [{"step": n, "held_out_kl": kl} for n, kl in enumerate(seen)] + [{"step": 9, "loss": 1.0}]
    said = warning_of(entry({"qat": {"tokens": "1M", **settings}}), row("a", 9.0, 0.01), row("b", 9.0, 0.05), curve)
    assert bool(said) == told
    if told:
        assert "KL to the teacher 0.04 -> 0.05 (rounded weights before and after training" in (said or "")


def test_nothing_is_said_of_what_was_not_measured() -> None:
    assert warning_of(entry(DISTILL), None, row("b", 9.0, 1.0)) is None


def test_stages_that_learn_from_the_teacher() -> None:
    assert learns_from_teacher(entry(DISTILL))
    assert not learns_from_teacher(entry({"distill": {"tokens": "1M", "teacher": "input"}}))
    assert not learns_from_teacher(entry({"prune": {"magnitude": {"keep": 0.5}}}))
    assert learns_from_teacher(entry({"prune": {"magnitude": {"keep": 0.5}, "tokens": "1M"}}))
