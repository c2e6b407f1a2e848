"""Stage `pretrain`: next-token prediction on the text itself."""

from dataclasses import replace

from ...losses.settings import LossSettings
from ..settings import PretrainSettings
from .context import StageContext, StageResult, Trained
from .distill import finish as finish
from .student_and_teacher import open_student
from .training import train_student, training_plan
from .zeros import keep_zeros_hooks, tell_unlisted_zeros


def train(settings: PretrainSettings, context: StageContext) -> Trained:
    """Train the input model on cross-entropy alone."""
    student = open_student(settings, context)
    tell_unlisted_zeros(context, student.model)
    # hard_weight=1 leaves only the cross-entropy term, so no teacher is opened
    alone = replace(settings, loss=LossSettings(hard_weight=1.0))
    plan = training_plan(alone, context, student)
    return train_student(student, alone, context, plan, hooks=keep_zeros_hooks(context, student.model))


__all__ = ["StageResult", "finish", "train"]
