"""Stage `qat`: train with rounded weights, end in codes and scales that exporters only shuffle."""

from ...qat.modules import fold, prepare, quantize_model
from ..settings import QatSettings
from .context import StageContext, StageResult, Trained
from .opening import open_student
from .quantize import save_quantized
from .training import keep_zeros_hooks, sparse_modules, train_student


def train(settings: QatSettings, context: StageContext) -> Trained:
    """Train the latent weights through fake-quantized linears."""
    student = open_student(context)
    sparse = sparse_modules(context.input)
    modules = prepare(student.model, settings.weights, settings.skip)
    group = settings.weights.group_size
    scales = f"groups of {group}" if isinstance(group, int) else "one scale a row"
    context.say(f"  {len(modules)} linear layers at {settings.weights.bits} bits, {scales}")
    return train_student(student, settings, context, hooks=keep_zeros_hooks(student.model, sparse), facts={"sparse": sparse})


def finish(settings: QatSettings, context: StageContext, trained: Trained | None) -> StageResult:
    """Take codes and scales from the latent weights, fold them, and write the quantized folder (rank 0)."""
    assert trained is not None
    state = quantize_model(trained.student, settings.weights, settings.skip)
    fold(trained.student, state)
    save_quantized(trained.student, state, context, trained.facts)
    return StageResult(model=context.model, tokens=trained.tokens, seconds=trained.seconds)
