"""What samples cost a training stage: operations, bytes that are read for them, and memory, from shapes alone.

A completion of M tokens takes M steps of a batch, and each step reads all weights once; so small batches wait for memory. Counted is the
longest case, in which every completion reaches its limit, and the teacher writes no window twice. Reading keys and values, which is little
beside the weights for texts of a window's length, is not counted, and neither is the rounding of weights in each step of a qat stage.
"""

from dataclasses import dataclass

from ...models.settings import LoadIn
from ...trainer.plan import TrainingPlan
from ...trainer.settings_samples import SamplesSettings
from .shapes import ModelShape
from .work import Work, teacher_work

_ENTRY_BYTES = 28
"""Bytes per entry of the vocabulary and text while a token is drawn: logits three times in up to fp32, softmax and sums in fp64."""
_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 0.5}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Samples of one stage."""

    tokens: int
    """Drawn tokens over all ranks, at most."""
    steps: int
    """Steps of drawing on each rank: forward passes of one token per text."""
    work: Work
    """Operations over all ranks."""
    read: float
    """Bytes of weights that each rank reads."""
    memory: int
    """Bytes on a device beside weights and moments: keys and values of a batch, and the distribution that a token is drawn from."""


@dataclass(frozen=True, kw_only=True)
class SamplingCase:
    """How a stage samples."""

    settings: SamplesSettings
    plan: TrainingPlan
    seq_length: int
    packed: bool
    chat: bool
    ranks: int


def sampling_cost(case: SamplingCase, student: ModelShape, teacher: ModelShape | None, load_in: LoadIn) -> Sampling:
    """Return what the samples of a stage cost, at most."""
    settings, plan = case.settings, case.plan
    total = plan.total_steps * plan.batch.global_windows
    # conversations: as many as fit if their prompts are short
    each = (
        max(1, case.seq_length // settings.max_new_tokens)
        if case.chat and case.packed
        else settings.per_window(case.seq_length, packed=case.packed)
    )
    by_teacher = {"student": 0.0, "mix": 0.5, "teacher": 1.0}[settings.from_]
    writers: list[tuple[ModelShape, float, LoadIn, bool]] = [(student, 1 - by_teacher, "fp32", plan.precision == "bf16-mixed")]
    if teacher is not None:
        writers.append((teacher, by_teacher, load_in, load_in != "fp32"))
    tokens, steps, work, read, memory = 0, 0, Work(), 0.0, 0
    for model, share, held, low in writers:
        windows = int(total * settings.share * share)
        if not windows:
            continue
        texts = windows * each
        refreshes = -(-plan.total_steps // settings.refresh)
        # each refresh ends with a batch that may not be full
        batches = max(refreshes, -(-texts // (case.ranks * settings.batch)))
        tokens += texts * settings.max_new_tokens
        steps += batches * settings.max_new_tokens
        # a forward pass for each token of prompt and completion, in the arithmetic of the model
        passed = texts * min(case.seq_length, settings.prompts + settings.max_new_tokens)
        work += teacher_work(model, case.seq_length // 2, "bf16" if low else "fp32") * passed
        read += batches * settings.max_new_tokens * _BYTES[held] * model.parameters
        sizes = model.dimensions
        cached = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * (2 if low else 4)
        memory = max(memory, settings.batch * (case.seq_length * cached + _ENTRY_BYTES * model.vocabulary))
    return Sampling(tokens=tokens, steps=steps, work=work, read=read, memory=memory)
