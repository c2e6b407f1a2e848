"""Evaluating while a stage trains: the figures are right, and no bit of the training knows of it."""

import io
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from decoct.trainer.data.blend import Blend
from decoct.trainer.evaluation.figures import evaluate_model
from decoct.trainer.loop.held_out import FIGURES, HeldOut, Watch, derive_watch, held_out_text

TIMES = ("seconds", "tokens_per_second", "peak_memory_bytes")


def rows(work: Path, *without: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in (*TIMES, *without)} for line in lines]


@pytest.mark.parametrize("kind", ["distill", "pretrain", "prune", "qat", "learned", "lattices"])
def test_evaluating_changes_no_bit_of_what_is_trained(training: ModuleType, tmp_path: Path, kind: str) -> None:
    plain, watched = training.Case(kind=kind, steps=12), training.Case(kind=kind, steps=12, watch=3)
    _, one = training.run_case(plain, tmp_path / "plain")
    _, other = training.run_case(watched, tmp_path / "watched")
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    begun, *steps = rows(tmp_path / "watched")
    assert [line["step"] for line in (begun, *steps) if FIGURES[1] in line] == [0, 3, 6, 9, 12]
    assert begun.keys() == {"stage", "step", "tokens", *FIGURES}
    assert [{k: v for k, v in line.items() if k not in FIGURES} for line in steps] == rows(tmp_path / "plain")


def test_figures_are_those_of_an_evaluation_of_the_same_windows(training: ModuleType, tmp_path: Path) -> None:
    case = training.Case(steps=6, watch=6, micro=2)
    objective = case.objective()
    watch = Watch(every=6, windows=5)
    text = training.RandomWindows(9, seed=77)
    held_out = HeldOut(text, watch, objective.teacher, training.VOCAB)
    _, student = training.run_case(case, tmp_path, objective=objective, held_out=held_out)
    chosen = _Some(text, [0, 1, 3, 5, 7])
    for line, model in ((rows(tmp_path)[0], case.student()), (rows(tmp_path)[-1], student)):
        seen = evaluate_model(model, objective.teacher, chosen, batch=2)  # pyright: ignore[reportArgumentType]
        assert line["held_out_perplexity"] == pytest.approx(seen.perplexity, rel=1e-5)
        assert line["held_out_kl"] == pytest.approx(seen.kl, rel=1e-4)


def test_each_text_of_a_blend_is_evaluated_however_small_it_is(training: ModuleType, tmp_path: Path) -> None:
    case = training.Case(steps=6, watch=6, micro=2)
    objective = case.objective()
    text = training.RandomWindows(40, seed=77)
    text.blend = Blend(("many", "few"), (38, 2), (19, 1))
    watch = derive_watch(6, total_steps=6, step_windows=1, seq_length=training.SEQ, available=40, ranks=1, texts=2)
    assert watch == Watch(every=6, windows=2)
    held_out = HeldOut(text, Watch(every=6, windows=8), objective.teacher, training.VOCAB)
    _, student = training.run_case(case, tmp_path, objective=objective, held_out=held_out)
    line = rows(tmp_path)[-1]
    for name, chosen in (("many", [0, 5, 10, 16, 21, 27, 32]), ("few", [38])):
        seen = evaluate_model(student, objective.teacher, _Some(text, chosen), batch=2)  # pyright: ignore[reportArgumentType]
        assert line[f"held_out_perplexity.{name}"] == pytest.approx(seen.perplexity, rel=1e-5), name
        assert line[f"held_out_kl.{name}"] == pytest.approx(seen.kl, rel=1e-4), name
    assert line["held_out_kl.few"] != pytest.approx(line["held_out_kl.many"], rel=1e-3)
    said = held_out_text({name: value for name, value in line.items() if name.startswith("held_out")})
    assert said.startswith(f"held-out KL {line['held_out_kl']:.4f}, perplexity ") and "; few KL " in said


class _Some:
    def __init__(self, text: Any, chosen: list[int]) -> None:
        self.text, self.chosen, self.seq_length = text, chosen, text.seq_length

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.text[self.chosen[index]]


def test_a_resumed_stage_evaluates_where_one_never_stopped_does(training: ModuleType, tmp_path: Path) -> None:
    case = training.Case(steps=12, every=4, watch=2)
    training.run_case(case, tmp_path)
    straight = (tmp_path / "metrics.jsonl").read_text()
    before = rows(tmp_path)
    shutil.rmtree(tmp_path / "stage/checkpoints/step-00000012")
    assert training.run_case(case, tmp_path)[0].resumed_from == 8
    assert rows(tmp_path) == before
    assert (tmp_path / "metrics.jsonl").read_text() != straight, "steps 9 to 12 were taken again"
    shutil.rmtree(tmp_path / "stage")
    training.run_case(case, tmp_path)
    assert rows(tmp_path) == before, "a stage that begins anew has one line before its first step"


def test_the_console_is_told(training: ModuleType, tmp_path: Path) -> None:
    out = io.StringIO()
    training.run_case(training.Case(steps=4, watch=2), tmp_path, console=Console(file=out, width=200))
    *told, best = [line for line in out.getvalue().splitlines() if "held-out" in line]
    assert best.startswith("distill: held-out KL was lowest after ")
    assert [line.split("  ")[1] for line in told] == ["step 0/4", "step 2/4", "step 4/4"]
    last = rows(tmp_path)[-1]
    assert told[-1].endswith(f"held-out KL {last['held_out_kl']:.4f}, perplexity {last['held_out_perplexity']:.2f}")


def test_a_cache_has_not_seen_this_text_and_gives_no_kl(training: ModuleType, tmp_path: Path) -> None:
    class Cache:
        v_eff = training.VOCAB

        def sparse_targets(self, batch: Mapping[str, Tensor]) -> Any:
            raise AssertionError("it is not asked")

        def to(self, device: Any) -> "Cache":
            return self

        def describe(self) -> str:
            return "a cache"

    held_out = HeldOut(training.RandomWindows(4), Watch(every=2, windows=2), Cache(), training.VOCAB)
    training.run_case(training.Case(kind="pretrain", steps=2), tmp_path, held_out=held_out)
    assert [line["held_out_kl"] for line in rows(tmp_path) if "held_out_kl" in line] == [None, None]
    assert all(line["held_out_perplexity"] > 1 for line in rows(tmp_path) if line["step"] != 1)


@pytest.mark.parametrize(
    ("every", "steps", "step_windows", "available", "ranks", "found"),
    [
        ("auto", 234, 2, 125, 1, Watch(every=30, windows=2)),  # the quickstart's first stage
        ("auto", 10_000, 32, 1000, 1, Watch(every=1250, windows=64)),  # as much as one evaluation may take
        ("auto", 10_000, 32, 10, 1, Watch(every=1250, windows=10)),  # as much as there is
        ("auto", 10_000, 32, 1000, 3, Watch(every=1250, windows=63)),  # the same on each rank
        ("auto", 10_000, 32, 2, 4, Watch(every=1250, windows=2)),  # too few to share
        ("auto", 12, 16, 32, 1, Watch(every=2, windows=1)),
        ("auto", 12, 2, 32, 1, None),  # 24 windows: one more would be dear
        (0, 234, 2, 125, 1, None),
        ("auto", 234, 2, 0, 1, None),
        (5, 12, 2, 125, 1, Watch(every=5, windows=1)),  # asked for
    ],
)
def test_how_a_stage_is_watched(every: Any, steps: int, step_windows: int, available: int, ranks: int, found: Watch | None) -> None:
    watch = derive_watch(
        every, total_steps=steps, step_windows=step_windows, seq_length=512 if steps > 1000 else 256, available=available, ranks=ranks
    )
    assert watch == found
    if watch is not None and every == "auto":
        evaluations = math.ceil(steps / watch.every) + 1
        assert evaluations <= 9
        assert evaluations * watch.windows <= 0.04 * steps * step_windows


@pytest.mark.parametrize(
    ("every", "steps", "available", "ranks", "found"),
    [
        ("auto", 234, 125, 1, Watch(every=30, windows=16)),  # 4,096 tokens, however little the stage trains on
        ("auto", 234, 125, 3, Watch(every=30, windows=16)),  # the same on any number of ranks
        ("auto", 12, 32, 1, Watch(every=2, windows=16)),  # also where a stage is too short for an evaluation that only informs
        (5, 12, 7, 1, Watch(every=5, windows=7)),  # as much as there is
        (0, 234, 125, 1, None),
        ("auto", 234, 0, 1, None),
    ],
)
def test_how_a_stage_is_watched_whose_evaluations_decide(every: Any, steps: int, available: int, ranks: int, found: Watch | None) -> None:
    watch = derive_watch(every, total_steps=steps, step_windows=2, seq_length=256, available=available, ranks=ranks, decides=True)
    assert watch == found


def test_figures_without_numbers_are_not_told() -> None:
    assert held_out_text(dict.fromkeys(FIGURES)) == ""
    assert held_out_text({"held_out_kl": None, "held_out_perplexity": 12.0}) == "held-out perplexity 12.00"
