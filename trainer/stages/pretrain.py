"""Stage `pretrain`: next-token prediction on the text itself."""

from dataclasses import replace

from ...losses.settings import LossSettings
from ..settings import PretrainSettings
from .context import StageContext, StageResult, Trained
from .distill import finish as finish
from .opening import open_student
from .training import keep_zeros_hooks, sparse_modules, train_student


def train(settings: PretrainSettings, context: StageContext) -> Trained:
    """Train the input on cross-entropy alone."""
    student = open_student(context)
    sparse = sparse_modules(context.input)
    alone = replace(settings, loss=LossSettings(hard_weight=1.0))
    return train_student(student, alone, context, hooks=keep_zeros_hooks(student.model, sparse), facts={"sparse": sparse})


__all__ = ["StageResult", "finish", "train"]
