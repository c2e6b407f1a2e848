"""Opens the samples of a training stage, and sums up what they were."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...models.common.errors import UserError
from ...models.generation import end_ids
from ...models.teachers import LocalTeacher, Teacher
from ..data.prompts import answer_end, check_ends
from ..loop.metrics import read_row
from ..loop.samples import Samples, Writers
from ..plan import TrainingPlan
from ..settings import TrainingBlock
from ..settings_samples import SamplesSettings
from ..soft_targets.cached import SparseTeacher, knows_given_text_alone
from .context import TrainingContext
from .student_and_teacher import OpenStudent

_LATE = 0.25
"""Share of the steps, at the end, over which the figures of the result are averaged."""


def open_samples(
    settings: TrainingBlock, student: OpenStudent, context: TrainingContext, plan: TrainingPlan, teacher: Teacher | SparseTeacher | None
) -> Samples | None:
    """The samples that the stage trains on; None without ``samples``.

    Raises:
        UserError: the teacher knows only the given text, or the models cannot write (see ``check_ends``, ``Samples``).
    """
    asked, run = settings.samples, context.run
    if asked is None:
        return None
    if teacher is None or knows_given_text_alone(teacher):
        # a recipe is refused before any work (configs/checks.py); this is for those who call the stage from Python
        raise UserError(
            f"{context.name}: samples are text that only a teacher in memory can judge; remove samples, or teacher.cache and teacher.served"
        )
    chat = run.data.samples is not None
    end = answer_end(run.tokenizer) if chat else None
    more = [] if end is None else [end]
    ends = end_ids(student.model, run.tokenizer, more)
    check_ends(ends, "the student")
    writers = Writers(v_eff=run.v_eff, student_ends=ends)
    if asked.by_teacher:
        # the weights themselves: a teacher of another kind may have none that could generate
        if not isinstance(teacher, LocalTeacher):
            raise UserError(f"{context.name}: samples.from={asked.from_} needs a teacher that is a model of transformers in memory")
        theirs = end_ids(teacher.model, run.tokenizer, more)
        writers = Writers(v_eff=run.v_eff, student_ends=ends, teacher=teacher.model, teacher_ends=theirs)
    samples = Samples(asked, run.data.train, plan, writers, chat=chat, folder=context.folder)
    context.say(f"  {_words(asked)}")
    return samples


def _words(asked: SamplesSettings) -> str:
    whose = {"student": "the student", "teacher": "the teacher", "mix": "student and teacher in turn"}[asked.from_]
    prompts = f"at most {asked.max_new_tokens:,} tokens each, temperature {asked.temperature:g}"
    every = "" if asked.from_ == "teacher" else f", drawn for {asked.refresh:,} step{'s' if asked.refresh > 1 else ''} at a time"
    return f"samples of {whose} in {asked.share:.0%} of the windows ({prompts}{every})"


def sample_facts(metrics: Path | None, stage: str, asked: SamplesSettings | None) -> dict[str, Any] | None:
    """What a stage has sampled, from its lines of ``metrics.jsonl``; None without samples, or without the file (on other ranks)."""
    if asked is None or metrics is None or not metrics.is_file():
        return None
    read = (read_row(line) for line in metrics.read_text(encoding="utf-8", errors="replace").split("\n"))
    rows = [row for row in read if row is not None and row["stage"] == stage and row["step"]]
    drawn = [row for row in rows if row.get("samples")]
    count, tokens = sum(row["samples"] for row in drawn), sum(row["sample_tokens"] for row in drawn)
    seconds = sum(row["sampling_seconds"] for row in drawn)
    late = rows[-max(1, round(len(rows) * _LATE)) :]
    # steps that were redone count once, because their lines are written anew
    trained = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second")]
    return {
        "from": asked.from_,
        "share": asked.share,
        "samples": count,
        "tokens": tokens,
        "mean_length": tokens / count if count else None,
        "cut": sum(row["samples"] * row["samples_cut"] for row in drawn) / count if count else None,
        "windows_without_prompt": sum(row["windows_without_prompt"] for row in rows if "windows_without_prompt" in row),
        "sampling_seconds": seconds,
        "sampling_tokens_per_second": tokens / seconds if seconds else None,
        "training_tokens_per_second": _mean(trained),
        "own_kl": _mean([row.get("own_kl") for row in late]),
        "given_kl": _mean([row.get("given_kl") for row in late]),
    }


def _mean(values: Sequence[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
