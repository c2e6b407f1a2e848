"""Whose predictions a stage learns, and what of a stage's plan does not depend on its student."""

from typing import Any

import pytest

from decoct.losses.settings import LossSettings
from decoct.models.common.errors import UserError
from decoct.models.settings import ServedSettings, TeacherSettings
from decoct.qat.spec import QuantSpec
from decoct.trainer.plan import derive_seed
from decoct.trainer.settings import (
    DistillSettings,
    EvaluateSettings,
    ExportSettings,
    PretrainSettings,
    TrainerSettings,
)
from decoct.trainer.settings_pruning import MagnitudeSettings, PruneSettings, StructuredSettings
from decoct.trainer.settings_quantization import QatSettings, QuantizeSettings
from decoct.trainer.stage_plan import HeldTeacher, derive_plan, derive_steps, held_teacher, learns_from, reads_text

TEXT_ALONE = LossSettings(hard_weight=1.0)
SERVED = ServedSettings(url="http://localhost:1/v1", model="big")


@pytest.mark.parametrize(
    ("settings", "with_teacher", "without"),
    [
        (DistillSettings(steps=1), "recipe", "input"),
        (DistillSettings(steps=1, teacher="input"), "input", "input"),
        (DistillSettings(steps=1, loss=TEXT_ALONE), None, None),
        (PretrainSettings(steps=1), None, None),
        (PruneSettings(magnitude=MagnitudeSettings(keep=0.5), steps=1), "recipe", "input"),
        (PruneSettings(magnitude=MagnitudeSettings(keep=0.5)), None, None),
        (PruneSettings(structured=StructuredSettings(ffn=8)), None, None),
        (QatSettings(weights=QuantSpec(), steps=1), "recipe", "input"),
        (ExportSettings(), None, None),
    ],
)
def test_whose_predictions_a_stage_learns(settings: Any, with_teacher: str | None, without: str | None) -> None:
    assert learns_from(settings, has_teacher=True) == with_teacher
    assert learns_from(settings, has_teacher=False) == without


def test_what_is_held_beside_the_student() -> None:
    rounded = TeacherSettings(path="x", load_in="nf4")
    assert held_teacher(DistillSettings(steps=1), rounded, name="01") == HeldTeacher("recipe", "nf4", "replicated")
    assert held_teacher(DistillSettings(steps=1, teacher="input"), rounded, name="01") == HeldTeacher("input", "fp32", "replicated")
    assert held_teacher(DistillSettings(steps=1), TeacherSettings(path="x", served=SERVED), name="01") is None
    with pytest.raises(UserError, match=r"^01: teacher: recipe, but the recipe has no teacher"):
        held_teacher(DistillSettings(steps=1, teacher="recipe"), None, name="01")


def test_a_plan_takes_its_steps_as_they_are_for_any_student() -> None:
    settings, trainer = DistillSettings(tokens=1000), TrainerSettings(global_batch_tokens=256)
    steps = derive_steps(settings, trainer, name="01-distill", seq_length=32, ranks=2, seed=7)
    assert (steps.total_steps, steps.batch.global_windows, steps.seed) == (4, 8, derive_seed(7, "01-distill"))
    narrow, wide = (derive_plan(settings, trainer, steps, kind="distill", hidden=hidden) for hidden in (192, 384))
    for plan in (narrow, wide):
        assert (plan.total_steps, plan.batch, plan.seed) == (steps.total_steps, steps.batch, steps.seed)
    assert narrow.learning_rate == 2 * wide.learning_rate == 1.5e-3


@pytest.mark.parametrize(
    ("kind", "settings", "by_start"),
    [
        ("distill", DistillSettings(steps=1), True),
        ("distill", DistillSettings(steps=1, learning_rate=1e-3), False),
        ("distill", DistillSettings(steps=1, loss=LossSettings(hard_weight=1.0)), False),  # there is no teacher to be near to
        ("pretrain", PretrainSettings(steps=1), False),
        ("qat", QatSettings(weights=QuantSpec(), steps=1), False),  # its rate follows from the bits
    ],
)
def test_the_default_rate_of_distilling_follows_from_the_first_step(kind: str, settings: Any, by_start: bool) -> None:
    trainer = TrainerSettings(global_batch_tokens=256)
    steps = derive_steps(settings, trainer, name="01", seq_length=32, ranks=1, seed=7)
    plan = derive_plan(settings, trainer, steps, kind=kind, hidden=192)
    assert plan.rate_from_start is by_start
    # checkpoints of stages that do not use it stay valid
    assert ("rate_from_start" in plan.identity()) is by_start


@pytest.mark.parametrize(
    ("settings", "reads"),
    [
        (DistillSettings(steps=1), True),
        (PretrainSettings(steps=1), True),
        (QatSettings(weights=QuantSpec(), steps=1), True),
        (PruneSettings(magnitude=MagnitudeSettings(keep=0.5), steps=1), True),
        (PruneSettings(magnitude=MagnitudeSettings(keep=0.5)), False),
        (PruneSettings(structured=StructuredSettings(ffn=8)), True),
        (QuantizeSettings(weights=QuantSpec()), False),
        (QuantizeSettings(weights=QuantSpec(), method="mse"), False),
        (QuantizeSettings(weights=QuantSpec(), method="mse", weighted=True), True),
        (QuantizeSettings(weights=QuantSpec(), method="gptq"), True),
        (ExportSettings(), False),
        (EvaluateSettings(), False),
    ],
)
def test_which_stages_need_text_besides_the_held_out_text(settings: Any, reads: bool) -> None:
    assert reads_text(settings) is reads
