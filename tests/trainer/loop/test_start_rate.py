"""The peak rate of a stage by how far its student starts from the teacher."""

import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from decoct.trainer.learning_rates import rate_at_start
from decoct.trainer.loop.start_rate import StartRate
from decoct.trainer.plan import BatchPlan, TrainingPlan, learning_rate

PLAN = TrainingPlan(
    total_steps=10, batch=BatchPlan(global_windows=1, micro_batch=1, accumulation=1), learning_rate=1e-3, rate_from_start=True
)


@pytest.mark.parametrize(
    ("kl", "share"), [(4.0, 1.0), (9.0, 1.0), (1.0, 0.5), (0.01, 0.05), (0.0, 0.005), (-1e-9, 0.005), (math.inf, 1.0), (math.nan, 1.0)]
)
def test_the_nearer_the_student_the_smaller_the_rate(kl: float, share: float) -> None:
    assert rate_at_start(kl) == pytest.approx(share)


def test_the_first_step_decides_and_a_checkpoint_keeps_it() -> None:
    said: list[str] = []
    hook = StartRate(PLAN, said.append)
    assert (hook.share, math.isnan(float(hook.state()["kl"]))) == (1.0, True)
    hook.see(0.04)
    hook.see(3.0)
    assert hook.share == pytest.approx(0.1)
    assert said == ["  peak learning rate 0.0001, as the student starts at KL 0.04"]
    resumed = StartRate(PLAN, said.append)
    resumed.load(hook.state())
    resumed.see(3.0)
    assert resumed.share == hook.share
    early = StartRate(PLAN, said.append)
    early.load({"kl": torch.tensor(math.nan)})
    early.see(1.0)
    assert early.share == 0.5


def test_a_stage_trains_at_the_share_that_its_first_step_gives(training: ModuleType, tmp_path: Path) -> None:
    case = training.Case(steps=4, start=1)
    training.run_case(case, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    plan, share = case.plan(), rate_at_start(lines[0]["kl"])
    assert 0.01 < share < 0.9
    for line in lines:
        whole = learning_rate(line["step"] - 1, 4, plan.learning_rate, plan.warmup, plan.schedule, plan.final_learning_rate)
        assert line["learning_rate"] == pytest.approx(whole * share, rel=1e-9)
