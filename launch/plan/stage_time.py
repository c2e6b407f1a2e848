"""What the stages of a recipe do, for their times: operations, steps and traffic of each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .duration import Cost, Duration, Speed, Step, reading_duration, reference_of, run_cost, training_duration, work_duration
from .memory_case import StageMemoryCase
from .plan_types import Machine, StagePlan
from .sampling_cost import Sampling
from .shapes import ModelShape
from .traffic import step_traffic
from .work import Work, backward_share, student_work, teacher_work


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """Work of one stage."""

    step: Step | None = None
    """A step of its training."""
    cache: Work | None = None
    """All operations of filling the teacher's cache, if it is empty."""
    sampling: Sampling | None = None
    """Samples that the stage draws while it trains."""
    imported: bool = False
    """Whether the stage is code that the recipe imports."""


def training_step(stage: str, student: ModelShape, teacher: ModelShape | None, case: StageMemoryCase) -> Step:
    """Describe an optimizer step.

    Args:
        teacher: Teacher that predicts in each step; None if there is none, or its predictions are read from a cache or a server.
    """
    seq, batch, checkpointing = case.seq_length, case.plan.batch, case.plan.activation_checkpointing
    work = student_work(student, seq, mixed=case.mixed, checkpointing=checkpointing)
    if teacher is not None:
        work += teacher_work(teacher, seq, case.load_in)
    return Step(
        stage=stage,
        steps=case.plan.total_steps,
        tokens=batch.global_windows * seq,
        work=work,
        beside=backward_share(student, seq, mixed=case.mixed, checkpointing=checkpointing) * case.tokens,
        traffic=step_traffic(student, teacher, case),
    )


def timed(stages: Sequence[StagePlan], works: Sequence[StageWork], machine: Machine, speed: Speed) -> tuple[list[StagePlan], Cost]:
    """Return the stages with the times of their parts, and time and price of the run."""
    # one measured stage gives the speed of the others
    reference = reference_of([work.step for work in works if work.step is not None], speed)
    found = []
    for stage, work in zip(stages, works, strict=True):
        durations: list[Duration] = []
        if work.imported:
            durations.append(Duration(part="imported code", seconds=None, origin="what imported code does is not known"))
        if work.cache is not None:
            durations.append(work_duration("cache", work.cache, speed, machine.ranks))
        if stage.rounding is not None and stage.rounding.flop:
            # rank 0 rounds alone, in fp32
            durations.append(work_duration("rounding", Work(fp32=stage.rounding.flop), speed, 1))
        if work.sampling is not None:
            durations.append(reading_duration("sampling", work.sampling.work, work.sampling.read, speed, machine.ranks))
        if work.step is not None:
            durations.append(training_duration(work.step, speed, nodes=machine.nodes, reference=reference))
        found.append(replace(stage, durations=durations))
    return found, run_cost({stage.name: stage.durations for stage in found}, speed, machine.gpus * machine.nodes)
