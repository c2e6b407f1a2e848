"""The bytes that a plan counts are those that 1, 2 and 4 processes hand to collectives."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from decoct.launch.plan.memory_case import StageMemoryCase
from decoct.launch.plan.shapes import shape_of
from decoct.launch.plan.traffic import Traffic, step_traffic
from decoct.qat.scheme import QuantScheme
from decoct.qat.spec import QuantSpec

from ...support import training_case
from ...support.training_case import SEQ, Case, tiny_model
from ...support.warm_python import WarmPython

SCRIPT = str(Path(training_case.__file__).with_name("traffic_case.py"))
STEPS = 2


def planned(case: Case, **changes: Any) -> Traffic:
    student, teacher = (shape_of(model.config, "") for model in (tiny_model(), tiny_model(tied=False)))
    scheme = QuantScheme(weights=QuantSpec(bits=4, group_size=16)) if case.kind == "learned" else None
    stage = StageMemoryCase(
        plan=case.plan(), seq_length=SEQ, ranks=case.ranks, on_gpu=False, load_in="fp32", scheme=scheme, learned_scales=scheme is not None
    )
    return step_traffic(student, teacher if changes else None, replace(stage, **changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "ranks", "options", "changes"),
    [
        ("pretrain", 1, {"strategy": "ddp"}, {}),
        ("pretrain", 1, {"strategy": "fsdp2"}, {}),
        ("pretrain", 2, {"strategy": "ddp", "micro": 2}, {}),
        ("pretrain", 4, {"strategy": "ddp", "micro": 1}, {}),
        ("pretrain", 2, {"strategy": "fsdp2", "micro": 2}, {}),
        ("pretrain", 4, {"strategy": "fsdp2", "micro": 2, "checkpointing": 1}, {}),
        ("learned", 2, {"strategy": "ddp"}, {}),
        ("learned", 2, {"strategy": "fsdp2"}, {}),
        ("distill", 2, {"strategy": "ddp", "micro": 2, "teacher": "sharded"}, {"placement": "sharded"}),
    ],
    ids=str,
)
def test_bytes_are_those_that_processes_exchange(
    kind: str, ranks: int, options: dict[str, Any], changes: dict[str, Any], warm: WarmPython, tmp_path: Path
) -> None:
    own = {key: value for key, value in options.items() if key != "teacher"}
    case = Case(kind=kind, ranks=ranks, steps=STEPS, every=STEPS, **own)
    given = [f"{key}={value}" for key, value in {**options, "ranks": ranks, "steps": STEPS, "every": STEPS}.items()]
    done = warm.run_ranks(ranks, [SCRIPT, str(tmp_path), kind, *given])
    assert [rank.returncode for rank in done] == [0] * ranks, "".join(rank.stdout + rank.stderr for rank in done)
    traffic = planned(case, **changes)
    for rank in done:
        counted = json.loads(rank.stdout.splitlines()[-1])
        expected = {kind: STEPS * getattr(traffic, kind) for kind in ("all_reduce", "all_gather", "reduce_scatter")}
        assert counted == expected


def test_one_process_sends_nothing() -> None:
    for strategy in ("ddp", "fsdp2"):
        assert planned(Case(kind="pretrain", strategy=strategy)).sent == 0


def test_rings() -> None:
    traffic = Traffic(ranks=4, all_reduce=100, all_gather=1000, reduce_scatter=500)
    assert traffic.sent == 0.75 * (2 * 100 + 1000 + 500)
    assert Traffic(ranks=2, all_reduce=100).sent == 100
