"""Gates: what is said of figures that miss them."""

import pytest

from decoct.trainer.evaluation.gates import gate_failures
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
