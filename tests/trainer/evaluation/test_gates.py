"""Gates: what is said of figures that miss them."""

import pytest

from decoct.trainer.evaluation.gates import gate_failures, task_failures
from decoct.trainer.settings import EvaluateSettings


@pytest.mark.parametrize(
    ("allowed", "perplexity", "said"), [(0.05, 10.4, None), (0.05, 11.0, "rose by 10.0%"), (-0.02, 9.9, "fell by 1.0%")]
)
def test_perplexity_is_held_against_the_teachers(allowed: float, perplexity: float, said: str | None) -> None:
    figures = {"perplexity": perplexity, "kl": None, "top1": None}
    failed = gate_failures(EvaluateSettings(max_perplexity_increase=allowed), figures, {"perplexity": 10.0})
    assert [message.split(",")[0] for message in failed] == ([] if said is None else [f"perplexity {said}"])
    assert gate_failures(EvaluateSettings(max_perplexity_increase=allowed), figures, None) == []


def test_small_gates_are_told_with_their_digits() -> None:
    settings = EvaluateSettings(max_perplexity_increase=0.0001, min_top1=0.9)
    figures = {"perplexity": 10.014, "kl": None, "top1": 0.89996}
    assert gate_failures(settings, figures, {"perplexity": 10.0}) == [
        "perplexity rose by 0.14%, allowed is max_perplexity_increase=0.01%",
        "top-1 agreement is 89.996%, wanted is min_top1=90%",
    ]


def test_numbers_that_are_none_and_nan() -> None:
    settings = EvaluateSettings(max_kl=0.1, min_top1=0.9)
    nothing = {"perplexity": 10.0, "kl": None, "top1": None}
    assert gate_failures(settings, nothing, None) == []
    broken = {"perplexity": float("nan"), "kl": float("nan"), "top1": float("nan")}
    assert len(gate_failures(EvaluateSettings(max_perplexity_increase=0.1, max_kl=0.1, min_top1=0.9), broken, {"perplexity": 9.0})) == 3


def test_a_gate_missed_by_what_chance_explains_fails_and_says_so() -> None:
    settings = EvaluateSettings(max_perplexity_increase=0.05, max_kl=0.1)
    figures = {"perplexity": 10.6, "kl": 0.11, "kl_se": 0.002, "top1": None}
    failed = gate_failures(settings, figures, {"perplexity": 10.0}, increase_se=0.006)
    assert failed[0].endswith("(the standard error is 0.60%: too little was measured to tell; a larger data.eval_tokens lowers it)")
    assert failed[1] == "KL to the teacher is 0.1100 nats, allowed is max_kl=0.1"


def score(value: float, **more: object) -> dict[str, object]:
    return {"metric": "acc", "score": value, "stderr": 0.01, "higher_is_better": True, **more}


def test_tasks_are_held_against_the_teachers_scores() -> None:
    teacher = {"arc": score(0.5), "own": score(0.8), "ppl": score(9.0, higher_is_better=False)}
    gates = {"arc": 0.95, "own": 0.5}
    assert task_failures(gates, {"arc": score(0.475), "own": score(0.4)}, teacher) == []
    failed = task_failures(gates, {"arc": score(0.47), "own": score(0.3)}, teacher)
    assert failed == [
        "task arc: acc 0.47 is 94.0% of the teacher's 0.5, wanted is min_task=95% (the standard error is 1.00%: too little was measured to "
        "tell; a larger task_limit lowers it)",
        "task own: acc 0.3 is 37.5% of the teacher's 0.8, wanted is min_task=50%",
    ]
    assert task_failures(gates, {"arc": score(0.1), "own": score(0.1)}, None) == []
    assert "less is better" in task_failures({"ppl": 1.0}, {"ppl": score(9.0, higher_is_better=False)}, teacher)[0]
    assert len(task_failures({"arc": 0.95}, {"arc": score(float("nan"))}, teacher)) == 1


def test_a_teacher_without_a_single_hit_has_nothing_to_fall_short_of() -> None:
    assert task_failures({"arc": 0.95}, {"arc": score(0.0)}, {"arc": score(0.0)}) == []
