"""Whole stages on samples: packed windows of a text, what is said and recorded, and what is refused when a stage opens."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from decoct.models.common.errors import UserError
from decoct.qat.spec import QuantSpec
from decoct.trainer.loop.metrics import MetricsSink
from decoct.trainer.loop.sample_file import row_from
from decoct.trainer.settings import DistillSettings, TrainerSettings
from decoct.trainer.settings_quantization import QatSettings
from decoct.trainer.settings_samples import SamplesSettings
from decoct.trainer.stages.context import StageContext
from decoct.trainer.stages.registry import STAGE_KINDS

TRAINER = TrainerSettings(precision="32", global_batch_tokens=128)
SAMPLES = SamplesSettings(prompts=4, max_new_tokens=10, refresh=2)
STEPS: dict[str, Any] = {"steps": 4, "learning_rate": 1e-3, "samples": SAMPLES}


def _context(make_context: Callable[..., StageContext], name: str, kind: str, tmp_path: Path, **changes: Any) -> StageContext:
    sink = MetricsSink(tmp_path / f"{name}.jsonl")
    return make_context(name, kind=kind, trainer=TRAINER, metrics=sink, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distill", "qat"])
def test_a_stage_trains_on_packed_samples_and_records_them(
    make_context: Callable[..., StageContext], tmp_path: Path, words: Any, kind: str
) -> None:
    quantizes = {"weights": QuantSpec(bits=4, group_size=16), "start": "mse"} if kind == "qat" else {}
    settings = (QatSettings if kind == "qat" else DistillSettings)(**STEPS, **quantizes)
    context = _context(make_context, kind, kind, tmp_path)
    work = STAGE_KINDS[kind].load()
    if work.start:
        work.start(settings, context)
    assert work.train is not None
    assert work.finish is not None
    result = work.finish(settings, context, work.train(settings, context))
    facts = result.facts["samples"]
    # 2 of 4 windows a step, two samples of 4 + 10 tokens in each of 32
    assert facts["samples"] == 4 * 2 * 2
    assert facts["from"] == "student"
    assert 1 <= facts["mean_length"] <= 10
    assert facts["own_kl"] is not None
    assert facts["given_kl"] is not None
    assert facts["sampling_tokens_per_second"] > 0
    said = context.run.console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "samples of the student in 50% of the windows (at most 10 tokens each, temperature 1, drawn for 2 steps at a time)" in said
    end = words.eos_token_id
    content = json.loads((context.folder / "samples/step-00000002.json").read_text())
    for row in map(row_from, content["rows"]):
        assert row.writer == "student"
        for one in row.samples:
            assert 1 <= len(one.prompt) <= 4
            assert one.prompt[-1] != end
            assert one.cut == (one.own[-1] != end)
        packed = row.as_window(32, packed=True)
        assert int((packed["labels"] != -100).sum()) == sum(len(one.own) for one in row.samples)


def test_text_that_a_stage_cannot_judge_or_end_is_refused(
    make_context: Callable[..., StageContext], tmp_path: Path, words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from decoct.trainer.stages import sampled_text
    from decoct.trainer.stages.student_and_teacher import OpenStudent

    context = _context(make_context, "distill", "distill", tmp_path)
    settings: Any = DistillSettings(**STEPS)
    student = OpenStudent(None, None, "ddp")  # pyright: ignore[reportArgumentType]
    plan: Any = None
    with pytest.raises(UserError, match=r"distill: samples are text that only a teacher in memory can judge; remove samples, or"):
        sampled_text.open_samples(settings, student, context, plan, None)
    assert sampled_text.open_samples(replace(settings, samples=None), student, context, plan, None) is None
    teacher: Any = object()
    monkeypatch.setattr(sampled_text, "end_ids", lambda *given: [])
    with pytest.raises(UserError, match="the student has no token that ends a text"):
        sampled_text.open_samples(settings, student, context, plan, teacher)
    monkeypatch.setattr(sampled_text, "end_ids", lambda *given: [0])
    asked = replace(settings, samples=replace(SAMPLES, from_="mix"))
    with pytest.raises(UserError, match=r"distill: samples\.from=mix needs a teacher that is a model of transformers in memory"):
        sampled_text.open_samples(asked, student, context, plan, teacher)


def test_a_sharded_student_is_refused_by_name() -> None:
    from decoct.trainer.stage_plan import wanted_strategy

    settings = DistillSettings(**STEPS)
    assert wanted_strategy(settings, TRAINER, name="01-distill") == "ddp"
    assert wanted_strategy(replace(settings, samples=None), TRAINER, name="01-distill") == "auto"
    with pytest.raises(UserError, match=r"01-distill: samples are drawn by the whole student on each rank.*set trainer\.strategy: ddp"):
        wanted_strategy(settings, replace(TRAINER, strategy="fsdp2"), name="01-distill")
