"""What a plan says of samples: tokens, steps, bytes and memory, counted by hand from the shapes of published models."""

from dataclasses import replace
from typing import Any

import pytest

from decoct.configs import recipe_from_dict
from decoct.launch.plan.duration import Speed
from decoct.launch.plan.gpus import GPUS
from decoct.launch.plan.make_plan import Plan, plan
from decoct.launch.plan.show import as_json, short_form

STUDENT, TEACHER = 361_821_120, 1_711_376_384
VOCABULARY = 49_152


def planned(samples: dict[str, Any] | None, *, packing: bool = True, **machine: Any) -> Plan:
    recipe = {
        "name": "x",
        "teacher": {"path": "HuggingFaceTB/SmolLM2-1.7B", "load_in": "nf4"},
        "student": {"path": "HuggingFaceTB/SmolLM2-360M"},
        "data": {"builtin": "python-stdlib", "seq_length": 512, "packing": packing},
        "trainer": {"global_batch_tokens": 65_536},
        "stages": [{"distill": {"steps": 100, "samples": samples}}],
    }
    return plan(recipe_from_dict(recipe), **{"gpus": 2, "speed": Speed(gpu=GPUS["H100"]), **machine})


def _sampling(made: Plan) -> Any:
    assert made.stages[0].training
    return made.stages[0].training.sampling


def test_samples_of_the_student_cost_steps_that_read_its_master_weights() -> None:
    made = planned({"from": "student", "share": 0.25, "refresh": 4})
    seen = _sampling(made)
    # 128 windows a step, a quarter of them samples, three of 32 + 128 tokens in each
    texts = 100 * 32 * 3
    assert seen.tokens == texts * 128
    # 384 texts for each refresh of 4 steps, on two processes in batches of 64
    batches = 25 * 4 * 32 * 3 // 2 // 64
    assert seen.steps == batches * 128
    assert seen.read == seen.steps * 4 * STUDENT
    # the head is part of the parameters, as it is tied
    assert seen.work.total == pytest.approx(2 * texts * 160 * STUDENT, rel=0.05)
    # 32 layers of 5 heads of 64, keys and values in bf16
    assert seen.memory == 64 * (512 * 2 * 32 * 5 * 64 * 2 + 28 * VOCABULARY)
    (sampling,) = (one for one in made.stages[0].durations if one.part == "sampling")
    h100 = GPUS["H100"]
    assert sampling.seconds == pytest.approx(seen.work.bf16 / (2 * 0.4 * h100.bf16) + seen.read / (0.4 * h100.bandwidth))
    assert "01-distill: draws samples of at most 1.23M tokens in 9,600 steps on each process, " in short_form(made)
    assert as_json(made)["stages"][0]["training"]["sampling"]["tokens"] == seen.tokens
    unknown = planned({"from": "student"}, gpus=0, speed=Speed())
    assert [one.seconds for one in unknown.stages[0].durations] == [None, None]


def test_each_refresh_takes_a_batch_and_a_teacher_reads_its_own_format() -> None:
    few = _sampling(planned({"from": "student", "share": 0.01}))
    assert few.steps == 100 * 128
    taught = _sampling(planned({"from": "teacher", "share": 0.25}))
    assert taught.read == taught.steps * 0.5 * TEACHER
    mixed = _sampling(planned({"from": "mix", "share": 0.25}))
    assert mixed.tokens == taught.tokens
    assert taught.read / taught.steps < mixed.read / mixed.steps < 4 * STUDENT
    # one completion in a padded window
    assert 3 * _sampling(planned({"from": "student", "share": 0.25}, packing=False)).tokens == taught.tokens
    assert _sampling(planned(None)) is None


def test_drawing_is_the_peak_of_memory_only_where_it_is_larger_than_a_step() -> None:
    plain, sampled = planned(None).stages[0].training, planned({"from": "student"}).stages[0].training
    assert plain
    assert sampled
    assert sampled.memory == plain.memory
    large = planned({"from": "student", "batch": 20_000}).stages[0].training
    assert large
    roles = large.memory
    assert roles.activations + roles.gradients + roles.logits == large.sampling.memory  # pyright: ignore[reportOptionalMemberAccess]
    assert replace(roles, activations=plain.memory.activations) == plain.memory
