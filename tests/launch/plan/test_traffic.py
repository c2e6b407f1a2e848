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
        plan=case.plan(), seq_length=SEQ, ranks=case.ranks, on_gpu=False, load_in="fp32", scheme=scheme, learned_scales=scheme is not None,
        nodes=2 if case.strategy == "hsdp" else 1,
    )  # fmt: skip
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
        ("pretrain", 2, {"strategy": "fsdp2", "micro": 2, "precision": "bf16-mixed", "checkpointing": 1}, {}),
        ("learned", 2, {"strategy": "fsdp2", "precision": "bf16-mixed"}, {}),
        ("pretrain", 4, {"strategy": "hsdp", "micro": 1, "precision": "bf16-mixed"}, {}),
    ],
    ids=str,
)
def test_bytes_are_those_that_processes_exchange(
    kind: str, ranks: int, options: dict[str, Any], changes: dict[str, Any], warm: WarmPython, tmp_path: Path
) -> None:
    own = {key: value for key, value in options.items() if key != "teacher"}
    case = Case(kind=kind, ranks=ranks, steps=STEPS, every=STEPS, **own)
    given = [f"{key}={value}" for key, value in {**options, "ranks": ranks, "steps": STEPS, "every": STEPS}.items()]
    done = warm.run_ranks(ranks, [SCRIPT, str(tmp_path), kind, *given], nodes=2 if case.strategy == "hsdp" else 1)
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
    assert traffic.sent_reduced == 150
    assert traffic.sent_inside == 0


def test_rings_of_machines() -> None:
    """Two machines of four: three quarters inside, a whole all-reduce of two between them, and a teacher over all eight."""
    traffic = Traffic(ranks=8, shares=4, all_reduce=100, all_gather=1000, reduce_scatter=600, taught=800)
    assert traffic.sent_reduced == 100
    assert traffic.sent_inside == 0.75 * (200 + 600)
    assert traffic.sent == 100 + 600 + 700


def test_bf16_halves_what_linears_take_of_a_gather() -> None:
    mixed, plain = (planned(Case(kind="pretrain", ranks=2, strategy="fsdp2", precision=form)) for form in ("bf16-mixed", "32"))
    shape = shape_of(tiny_model().config, "")
    linears = sum(rows * columns for rows, columns in shape.linears.values())
    norms = shape.parameters - shape.outside - linears
    # two gathers in each micro-batch, of norms one
    saved = 2 * 2 * linears + 4 * norms
    assert plain.all_gather - mixed.all_gather == Case(kind="pretrain", ranks=2).plan().batch.accumulation * saved
    assert plain.reduce_scatter == mixed.reduce_scatter
    compiled = planned(Case(kind="pretrain", ranks=2, strategy="fsdp2", precision="bf16-mixed", compile=1))
    assert compiled.all_gather == plain.all_gather
