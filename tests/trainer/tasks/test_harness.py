"""The adapter of lm-eval, as far as it goes without the package; tests/serving/test_lm_eval.py asks the real one."""

from collections.abc import Sequence
from typing import Any

import pytest

from decoct.models.common.errors import UserError
from decoct.trainer.tasks import harness
from decoct.trainer.tasks.harness import _generated, _numbers, known_tasks


class Recorder:
    def __init__(self) -> None:
        self.asked: list[tuple[list[str], tuple[str, ...], int]] = []

    def generate_until(self, prompts: Sequence[str], until: Sequence[str], most: int) -> list[str]:
        self.asked.append((list(prompts), tuple(until), most))
        return [prompt.upper() for prompt in prompts]


def test_requests_with_the_same_stops_go_together_and_come_back_in_order() -> None:
    model: Any = Recorder()
    got = _generated(
        model, [("a", {"until": "\n"}), ("b", {"until": ["."], "max_gen_toks": 5}), ("c", {"until": ["\n"], "do_sample": False})]
    )
    assert got == ["A", "B", "C"]
    assert model.asked == [(["a", "c"], ("\n",), 256), (["b"], (".",), 5)]


def test_a_task_that_samples_is_refused_and_one_at_temperature_0_is_greedy() -> None:
    model: Any = Recorder()
    assert _generated(model, [("a", {"do_sample": True, "temperature": 0.0})]) == ["A"]
    with pytest.raises(UserError, match=r"samples its answers .* set do_sample: false"):
        _generated(model, [("a", {"do_sample": True, "temperature": 0.8})])


def test_metrics_keep_their_order_and_filter_and_lose_their_errors() -> None:
    result = {"alias": "x", "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.1, "acc,none": 1, "f1,none": "N/A"}
    assert list(_numbers(result).items()) == [("exact_match (strict-match)", 0.5), ("acc", 1.0)]


def test_without_the_package_a_name_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "installed", lambda: False)
    with pytest.raises(UserError, match=r"task arc_easy: lm-eval is not installed.*pip install 'decoct\[tasks\]'.*cloze"):
        known_tasks(["arc_easy"])
