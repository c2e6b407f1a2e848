"""The plan and the stages say the same of a stage's teacher, and choose the same strategy for its student."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from decoct.configs import recipe_from_dict
from decoct.launch.plan.make_plan import plan
from decoct.models.common.errors import UserError
from decoct.trainer.stages import student_and_teacher
from decoct.trainer.stages.student_and_teacher import stage_strategy, stage_teacher_bytes

RANKS, ADAMW = 8, 16
QAT: dict[str, Any] = {"steps": 2, "weights": {"bits": 4, "group_size": 64}}
SERVED = {"served": {"url": "http://localhost:1/v1", "model": "big"}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bf16": ({}, {"distill": {"steps": 2}}),
    "fp32": ({"load_in": "fp32"}, {"distill": {"steps": 2}}),
    "int8": ({"load_in": "int8"}, {"distill": {"steps": 2}}),
    "nf4": ({"load_in": "nf4"}, {"prune": {"magnitude": {"keep": 0.5}, "steps": 2}}),
    "sharded": ({"placement": "sharded"}, {"distill": {"steps": 2}}),
    "fp32-sharded": ({"load_in": "fp32", "placement": "sharded"}, {"qat": QAT}),
    "offloaded": ({"placement": "offloaded"}, {"distill": {"steps": 2}}),
    "cached": ({"cache": {}}, {"distill": {"steps": 2}}),
    "served": (SERVED, {"distill": {"steps": 2}}),
    "its-own-input": ({}, {"qat": {**QAT, "teacher": "input"}}),
    "text-alone": ({}, {"distill": {"steps": 2, "loss": {"hard_weight": 1.0}}}),
    "pretrain": ({"load_in": "fp32"}, {"pretrain": {"steps": 2}}),
    "scales": ({}, {"qat": {**QAT, "train": "scales"}}),
}
NO_TEACHER = ("served", "text-alone", "pretrain")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a teacher of 4 layers and of a student of 2, without a tokenizer."""
    places = {}
    for name, layers in (("teacher", 4), ("student", 2)):
        config = LlamaConfig(
            vocab_size=384, hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2
        )
        places[name] = str(tmp_path_factory.mktemp(name))
        LlamaForCausalLM(config).save_pretrained(places[name])
    return places


def recipe(models: dict[str, str], case: str, **trainer: Any) -> Any:
    held, stage = CASES[case]
    return recipe_from_dict(
        {
            "name": "x",
            "teacher": {"path": models["teacher"], **held},
            "student": {"path": models["student"]},
            "data": {"builtin": "python-stdlib", "seq_length": 64},
            "stages": [stage],
            "trainer": {"global_batch_tokens": 64 * RANKS, **trainer},
        }
    )


def context(recipe: Any) -> Any:
    """What a stage needs to choose: its input, the run's teacher and trainer."""
    teacher = SimpleNamespace(**{name: getattr(recipe.teacher, name) for name in ("path", "revision", "load_in", "placement", "served")})
    run = SimpleNamespace(teacher=teacher, trainer=recipe.trainer)
    return SimpleNamespace(run=run, name="01", input=recipe.student.path, input_revision=None)


@pytest.mark.parametrize("case", CASES)
def test_the_plan_shows_the_bytes_that_auto_decides_by(models: dict[str, str], case: str) -> None:
    made = recipe(models, case)
    training = plan(made, gpus=RANKS, gpu_memory=80 * 10**9).stages[0].training
    assert training is not None
    assert training.memory.teacher == stage_teacher_bytes(made.stages[0].settings, context(made), RANKS)
    assert (training.memory.teacher == 0) == (case in NO_TEACHER)


@pytest.mark.parametrize("case", CASES)
def test_the_plan_and_the_stage_choose_the_same_strategy(models: dict[str, str], case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(models, case)
    monkeypatch.setattr(student_and_teacher, "current_world", lambda: SimpleNamespace(size=RANKS))
    monkeypatch.setattr(student_and_teacher, "value_of_first", lambda value: value)
    stage = plan(made, gpus=RANKS, gpu_memory=80 * 10**9).stages[0]
    assert stage.training is not None
    # where 60 % of a GPU is just filled, and just not
    limit = int((ADAMW * stage.parameters + stage.training.memory.teacher) / 0.6)
    for memory, expected in ((limit - 100, "fsdp2"), (limit + 100, "ddp")):
        monkeypatch.setattr(student_and_teacher, "device_bytes", lambda memory=memory: memory)
        chosen = stage_strategy(made.stages[0].settings, context(made))
        values = {value.key: value.value for value in plan(made, gpus=RANKS, gpu_memory=memory).stages[0].values}
        assert values["trainer.strategy"] == chosen
        assert chosen == ("ddp" if case == "scales" else expected)


def test_scales_alone_cannot_be_spread_and_the_plan_says_so_too(models: dict[str, str]) -> None:
    made = recipe(models, "scales", strategy="fsdp2")
    for ask in (lambda: plan(made, gpus=RANKS), lambda: stage_strategy(made.stages[0].settings, context(made))):
        with pytest.raises(UserError, match=r"train: scales keeps codes of one byte a weight whole on every rank"):
            ask()
