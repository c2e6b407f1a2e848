"""What the plan says of a stage's memory, beside what the stage really takes in a fresh process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.launch.plan.memory import Roles

SIZES = {"hidden": 512, "layers": 4, "heads": 8, "kv_heads": 4, "ffn": 1024, "vocab": 512, "tokens": "8k"}
SCRIPT = Path(__file__).parent / "memory_case.py"


CASES = ["distill", "qat", "distill+checkpointing", "distill+features+checkpointing"]
Measured = dict[str, dict[str, Any]]


def _measure(cases: list[str]) -> Measured:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT), *cases], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["case"]: line for line in lines}


@pytest.fixture(scope="module")
def measured() -> Measured:
    return _measure(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_prediction_is_within_a_quarter_of_the_memory_of_a_process(measured: Measured, case: str) -> None:
    found = measured[case]
    assert found["measured"] > 500e6
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.25), found


def _roles(**qat: Any) -> Roles:
    from decoct.configs import recipe_from_dict
    from decoct.launch.plan.make_plan import plan

    stage = {"qat": {"steps": 2, "weights": {"bits": 4, "group_size": 64}, "teacher": "input", **qat}}
    data = {"builtin": "python-stdlib", "seq_length": 256}
    models = {"teacher": {"scratch": SIZES}, "student": {"keep": {"layers": 4}}}
    training = plan(recipe_from_dict({"name": "x", **models, "data": data, "stages": [stage]})).stages[0].training
    assert training is not None
    return training.memory


def test_what_does_not_train_takes_no_gradient_and_no_moments() -> None:
    everything, absmax, scales, lora = _roles(), _roles(scales="absmax"), _roles(train="scales"), _roles(lora=8)
    linear = 4 * (2 * 512 * 512 + 2 * 256 * 512 + 3 * 512 * 1024)
    groups, adapters = linear // 64, 4 * 8 * (2 * 1024 + 2 * (512 + 256) + 3 * (512 + 1024))
    assert everything.student - absmax.student == 4 * groups
    assert scales.gradients == 4 * groups and scales.optimizer == 8 * groups
    assert absmax.student - scales.student == 3 * linear - 4 * groups
    assert lora.optimizer == 8 * (groups + adapters)
    assert scales.activations < everything.activations


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", ["distill+cuda", "qat+cuda", "distill+checkpointing+cuda"])
def test_prediction_is_within_15_percent_of_the_allocators_peak(case: str) -> None:
    found = _measure([case])[case]
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.15), found


def _featured(features: dict[str, Any] | None, **keep: Any) -> int:
    from decoct.configs import recipe_from_dict
    from decoct.launch.plan.make_plan import plan

    stage = {"distill": {"steps": 2, "loss": {"features": features} if features else {}}}
    data = {"builtin": "python-stdlib", "seq_length": 256}
    student = keep or {"keep": {"layers": 2}}
    recipe = {"name": "x", "teacher": {"scratch": SIZES}, "student": student, "data": data, "stages": [stage]}
    training = plan(recipe_from_dict({**recipe, "trainer": {"global_batch_tokens": 256, "micro_batch": 1}})).stages[0].training
    assert training is not None
    return training.memory.activations


def test_hidden_states_relations_and_projectors_are_counted() -> None:
    alone, tokens = _featured(None), 256
    hidden = _featured({"hidden": {"weight": 1}}) - alone
    # two layers of a bf16 teacher, the student's last one, and the work of one pair
    assert hidden == tokens * 512 * (2 * 2 + 4 + 4 * 4)
    assert _featured({"hidden": {"weight": 1, "layers": "last"}}) - alone == hidden - tokens * 512 * 2
    relations = _featured({"relations": {"weight": 1, "of": ["qq", "vv"]}}) - alone
    # queries and values of a bf16 teacher and of a student under bf16 autocast, and one sequence's matrices
    assert relations == tokens * (512 + 256) * (2 + 2) + 6 * 4 * 8 * 256**2
    narrow = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    less = _featured({"hidden": {"weight": 1}}, config=narrow) - _featured(None, config=narrow)
    assert less == tokens * (512 * 2 * 2 + 256 * 4 + 512 * 4 * 4) + 2 * 16 * 512 * 256


def test_a_pair_of_layers_that_does_not_exist_is_refused_before_any_work() -> None:
    from decoct.models.common.errors import UserError

    with pytest.raises(
        UserError, match=r"01-distill: loss\.features\.hidden\.layers: the pair \[2, 0\] does not exist: the student has 2 layers"
    ):
        _featured({"hidden": {"weight": 1, "layers": [[2, 0]]}})
