"""Stage `distill`: the student learns to predict what the teacher predicts."""

from ..settings import DistillSettings
from .context import StageContext, StageResult, Trained
from .saving import save_trained
from .student_and_teacher import open_student
from .training import train_student, training_plan
from .zeros import keep_zeros_hooks, tell_unlisted_zeros


def train(settings: DistillSettings, context: StageContext) -> Trained:
    """Train the input model on the loss of the settings. Exact zeros of a sparse folder stay zero."""
    student = open_student(settings, context)
    # before training moves them
    tell_unlisted_zeros(context, student.model)
    plan = training_plan(settings, context, student)
    return train_student(student, settings, context, plan, hooks=keep_zeros_hooks(context, student.model))


def finish(settings: DistillSettings, context: StageContext, trained: Trained | None) -> StageResult:
    """Write the trained student as a model folder (rank 0)."""
    assert trained is not None
    return save_trained(trained, context)
