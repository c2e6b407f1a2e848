"""Times and prices: by hand, from a GPU's peak, from a measured speed, and none where nothing is known."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from decoct.configs import load_recipe
from decoct.launch.plan.duration import EFFICIENCY, NO_SPEED, Speed, Step, reference_of, run_cost, training_duration, work_duration
from decoct.launch.plan.gpus import GPUS, Gpu
from decoct.launch.plan.make_plan import plan
from decoct.launch.plan.measured_speed import measured_speeds
from decoct.launch.plan.show import as_json, draw, short_form
from decoct.launch.plan.traffic import Traffic
from decoct.launch.plan.units import span
from decoct.launch.plan.work import Work

# round numbers: 1,000 bf16 and 100 fp32 operations a second, 10 bytes a second
TOY = Gpu("toy", 1000.0, 100.0, 10**9, 10.0, 50.0)


def step(name: str = "a", *, steps: int = 5, tokens: int = 10, ranks: int = 1, **traffic: Any) -> Step:
    work, beside = Work(bf16=40.0, fp32=6.0), Work(bf16=200.0)
    return Step(stage=name, steps=steps, tokens=tokens, work=work, beside=beside, traffic=Traffic(ranks=ranks, **traffic))


def test_operations_by_hand() -> None:
    # per step 10 tokens: 400 / 1000 + 60 / 100 = 1 s at the peak, 2 s at half of it
    speed = Speed(gpu=TOY, efficiency=0.5)
    one = training_duration(step(), speed, nodes=1, reference=None)
    assert (one.seconds, one.compute_seconds, one.communication_seconds) == (10.0, 10.0, None)
    assert one.origin == "50% of the peak of toy"
    two = training_duration(step(ranks=2), speed, nodes=1, reference=None)
    assert two.seconds == 5.0


@pytest.mark.parametrize(
    ("traffic", "seconds"),
    [
        # ddp sends 2 x 1/2 x 2 bytes in 0.2 s, beside 200 / 1000 / 0.5 = 0.4 s of backward pass: hidden
        ({"all_reduce": 2}, 1.0),
        # 1.4 s, of which 0.4 are hidden
        ({"all_reduce": 14}, 2.0),
        # fsdp2 sends 1/2 x (12 + 4) bytes in 0.8 s, beside the 1 s of a step
        ({"all_gather": 12, "reduce_scatter": 4}, 1.0),
        # 3 s
        ({"all_gather": 40, "reduce_scatter": 20}, 3.0),
        # ddp with a sharded teacher: each has its own place to hide
        ({"all_reduce": 14, "all_gather": 40}, 3.0),
    ],
    ids=str,
)
def test_what_hides_communication(traffic: dict[str, Any], seconds: float) -> None:
    found = training_duration(step(ranks=2, **traffic), Speed(gpu=TOY, efficiency=0.5), nodes=1, reference=None)
    assert found.seconds == pytest.approx(5 * seconds)
    assert found.compute_seconds == 5.0
    sent = Traffic(ranks=2, **traffic).sent
    assert found.communication_seconds == pytest.approx(5 * sent / 10)
    assert found.origin == "50% of the peak of toy, 1e-08 GB/s between GPUs"


def test_a_link_between_machines_is_not_guessed() -> None:
    speed = Speed(gpu=TOY, efficiency=0.5)
    unknown = training_duration(step(ranks=2, all_gather=40), speed, nodes=2, reference=None)
    assert (unknown.seconds, unknown.communication_seconds) == (5.0, None)
    assert unknown.origin.endswith("without communication between machines, whose speed is not known (--link)")
    known = training_duration(step(ranks=2, all_gather=40), Speed(gpu=TOY, efficiency=0.5, link=4.0), nodes=2, reference=None)
    assert known.seconds == 25.0


def test_nothing_is_invented_without_a_gpu() -> None:
    assert training_duration(step(), Speed(), nodes=1, reference=None).seconds is None
    assert work_duration("rounding", Work(fp32=1.0), Speed(), 1).seconds is None
    made = plan(load_recipe("quickstart"))
    assert made.cost.seconds is None
    assert made.cost.gpu_hours is None
    assert made.cost.unknown[0] == "01-distill, training"
    assert "time" not in short_form(made)
    console = Console(width=200, record=True, file=io.StringIO())
    draw(made, console, values=False)
    assert f"time: not known; {NO_SPEED}" in console.export_text()


def test_a_measured_speed_is_taken_and_scales_by_operations() -> None:
    steps = [step("a"), Step(**{**vars(step("b")), "work": Work(bf16=80.0, fp32=12.0)})]
    given = Speed(gpu=TOY, tokens_per_second=25.0)
    reference = reference_of(steps, given)
    one, two = (training_duration(each, given, nodes=1, reference=reference) for each in steps)
    assert (one.seconds, two.seconds) == (2.0, 4.0)
    assert one.origin == "25 tokens/s, as given (--tokens-per-second)"
    assert two.origin == "from a, by operations: 12 tokens/s, as given (--tokens-per-second)"
    # fp32 counts ten times as much on this GPU, and as much as bf16 where the GPU is not known
    heavy = Step(**{**vars(step("b")), "work": Work(bf16=40.0, fp32=16.0)})
    assert training_duration(heavy, given, nodes=1, reference=reference).seconds == pytest.approx(2.0 * 200 / 100)
    blind = Speed(tokens_per_second=25.0)
    assert training_duration(heavy, blind, nodes=1, reference=reference_of(steps, blind)).seconds == pytest.approx(2.0 * 56 / 46)
    logged = Speed(measured={"b": 5.0})
    reference = reference_of(steps, logged)
    assert [training_duration(each, logged, nodes=1, reference=reference).seconds for each in steps] == [5.0, 10.0]


def test_the_speed_of_a_run_is_the_median_of_its_newest_steps(tmp_path: Path) -> None:
    assert measured_speeds(tmp_path) == {}
    rows = [{"stage": "a", "step": n, "tokens_per_second": 1.0 if n < 3 else 100.0 + n} for n in range(6)]
    rows += [{"stage": "b", "step": 9, "tokens_per_second": None}, {"stage": "b", "step": 10, "tokens_per_second": float("nan")}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"stage": "a", "st')
    assert measured_speeds(tmp_path) == {"a": 104.0}


def test_cost_by_hand() -> None:
    done = training_duration(step(), Speed(gpu=TOY, efficiency=0.5), nodes=1, reference=None)
    missing = training_duration(step("b"), Speed(), nodes=1, reference=None)
    cost = run_cost({"a": [done], "b": [missing]}, Speed(gpu=TOY, efficiency=0.5, price=7.2), 8)
    assert (cost.seconds, cost.unknown) == (10.0, ["b, training"])
    assert cost.gpu_hours == pytest.approx(8 * 10 / 3600)
    assert cost.money == pytest.approx(7.2 * 8 * 10 / 3600)
    assert run_cost({"a": [done]}, Speed(price=1.0), 0).money is None


def test_a_plan_names_hours_and_money() -> None:
    speed = Speed(gpu=GPUS["H100"], price=2.0)
    made = plan(load_recipe("qwen3-8b-4b-int4"), gpus=8, speed=speed)
    assert made.machine.gpu_memory == 80 * 10**9
    parts = {(stage.name, one.part): one for stage in made.stages for one in stage.durations}
    assert list(parts) == [("01-distill", "training"), ("03-recover", "training"), ("04-qat", "rounding"), ("04-qat", "training")]
    first = made.stages[0].training
    assert first is not None
    compute = parts["01-distill", "training"].compute_seconds
    assert compute is not None
    # between all operations at the peak of bf16, and all at that of fp32
    assert first.flop / (8 * EFFICIENCY * 989e12) < compute < first.flop / (8 * EFFICIENCY * 67e12)
    assert made.cost.money == pytest.approx(2.0 * 8 * sum(one.seconds or 0 for one in parts.values()) / 3600)
    assert "GPU hours" in short_form(made)
    found = json.loads(json.dumps(as_json(made)))
    assert found["cost"]["money"] == made.cost.money
    assert found["stages"][0]["durations"][0]["origin"] == "40% of the peak of H100, 450 GB/s between GPUs"


def test_a_cache_is_filled_once_and_its_stages_run_no_teacher() -> None:
    speed = Speed(gpu=GPUS["H100"])
    plain = plan(load_recipe("qwen3-8b-4b-int4"), gpus=8, speed=speed)
    cached = plan(load_recipe("qwen3-8b-4b-int4", ["teacher.cache.mode=top_k"]), gpus=8, speed=speed)
    one, other = plain.stages[0], cached.stages[0]
    assert [each.part for each in other.durations] == ["cache", "training"]
    assert one.training is not None
    assert other.training is not None
    assert other.training.flop < one.training.flop


def test_times_as_text() -> None:
    assert [span(seconds) for seconds in (0.5, 45.2, 119, 150, 7199, 7200, 360000)] == [
        "0.5 s", "45 s", "119 s", "2 min", "120 min", "2.0 h", "100.0 h"
    ]  # fmt: skip


def test_imported_code_has_no_time_and_no_bound(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from decoct import parts\n\n\n@parts.stage('shake')\ndef shake(context):\n    pass\n\n\n"
        "@parts.data_source('letters')\ndef letters():\n    yield 'a'\n"
    )
    text = "import: mine.py\nstudent: {path: Qwen/Qwen3-8B}\ndata: {source: letters}\nstages: [{pretrain: {tokens: 1M}}, shake]\n"
    (tmp_path / "recipe.yaml").write_text(text)
    made = plan(load_recipe(str(tmp_path / "recipe.yaml")), gpus=8, speed=Speed(gpu=GPUS["H100"]))
    assert made.cost.unknown == ["02-shake, imported code"]
    assert made.cost.seconds is not None
    assert made.tokenized_bytes is None
    assert short_form(made).endswith("without tokenizing, evaluation, checkpoints, exports and 02-shake, imported code")
