"""A stage `distill` with terms on hidden states and relations: layers by record, what is told, what no folder holds."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.losses.settings import LossSettings
from decoct.losses.settings_features import FeatureSettings, HiddenSettings, RelationSettings
from decoct.models.common.errors import UserError
from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import save_model_folder
from decoct.models.folder.record import read_record
from decoct.models.student import student_by_keeping
from decoct.models.teachers import TeacherRef
from decoct.trainer.loop.metrics import MetricsSink
from decoct.trainer.settings import DistillSettings, TrainerSettings
from decoct.trainer.stages import distill
from decoct.trainer.stages.context import StageContext

BOTH = FeatureSettings(hidden=HiddenSettings(weight=0.5, layers="kept"), relations=RelationSettings(weight=0.1))


@pytest.fixture
def context(make_context: Callable[..., StageContext], trained_folder: Path, words: Any, tmp_path: Path) -> Callable[..., StageContext]:
    """``context(record, **changes)``: a stage whose input is layers 0 and 2 of the teacher, with this record."""
    teacher = TeacherRef(
        path=str(trained_folder), load_in="fp32", placement="replicated", revision=None, name="tiny", content="hash"
    )  # fmt: skip

    def make(record: dict[str, Any], **changes: Any) -> StageContext:
        student, kept = student_by_keeping(load_model(trained_folder, dtype=torch.float32), 2)
        assert kept == [0, 2]
        folder = save_model_folder(tmp_path / "student", student, words, {"kind": "student", **record}, dtype=torch.float32)
        trainer = changes.pop("trainer", TrainerSettings(precision="32", global_batch_tokens=256, micro_batch=4))
        metrics = MetricsSink(tmp_path / "metrics.jsonl")
        changes = {"teacher": teacher, "trainer": trainer, "metrics": metrics, **changes}
        return make_context("01-distill", kind="distill", input=str(folder), **changes)

    return make


def test_layers_are_paired_by_what_the_student_was_cut_from(context: Callable[..., StageContext]) -> None:
    stage = context({"kept": {"layers": [0, 2]}, "parent_shape": {"layers": 3}})
    settings = DistillSettings(steps=6, loss=LossSettings(features=BOTH))
    result = distill.finish(settings, stage, distill.train(settings, stage))
    said = stage.run.console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "hidden states of 2 pairs of layers (student-teacher 0-0, 1-2), cosine, weight 0.5" in said
    assert "relations qq, kk, vv of 1 pair of layers (student-teacher 1-2), 4 relation heads, weight 0.1" in said
    assert "projector" not in said, "the widths are the same"
    lines = [json.loads(line) for line in (stage.folder.parent / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "loss_hidden" in line)
    assert result.facts["terms"]["hidden"] == {"weight": 0.5, "mean": pytest.approx(last["loss_hidden"])}
    assert result.facts["terms"].keys() == {"predictions", "hidden", "relations"}
    assert read_record(stage.model)["root"] == {"shape": {"layers": 3}, "kept": {"layers": [0, 2]}}, "a later stage can ask for it too"


def test_projectors_are_in_no_folder(context: Callable[..., StageContext], trained_folder: Path, words: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    narrow = save_model_folder(tmp_path / "narrow", LlamaForCausalLM(config).eval(), words, {}, dtype=torch.float32)
    stage = replace(context({}), input=str(narrow))
    settings = DistillSettings(steps=3, loss=LossSettings(features=FeatureSettings(hidden=HiddenSettings(weight=0.5))))
    distill.finish(settings, stage, distill.train(settings, stage))
    assert "2 projectors 48 x 32, which the stage drops at its end" in stage.run.console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert load_model(stage.model, dtype=torch.float32).state_dict().keys() == load_model(narrow, dtype=torch.float32).state_dict().keys()
    assert (stage.folder / "checkpoints/step-00000003/hooks-0.safetensors").exists()


def test_layers_without_a_record_are_refused(context: Callable[..., StageContext], tmp_path: Path) -> None:
    settings = DistillSettings(steps=2, loss=LossSettings(features=BOTH))
    with pytest.raises(UserError, match=r"01-distill: loss\.features\.hidden\.layers: kept, but the stage's input does not record"):
        distill.train(settings, context({}))
    assert not (tmp_path / "01-distill/checkpoints").exists()


def test_compiled_layers_are_refused(context: Callable[..., StageContext]) -> None:
    settings = DistillSettings(steps=2, loss=LossSettings(features=BOTH))
    compiled = TrainerSettings(precision="32", global_batch_tokens=256, micro_batch=4, compile=True)
    with pytest.raises(UserError, match=r"compiled layers \(trainer.compile\) do not show it"):
        distill.train(settings, context({}, trainer=compiled))
