"""The cheapest change that makes a stage fit a GPU: what costs no quality and no time first, more GPUs last."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ...trainer.batch import divisors
from .memory import RESERVE, Roles, Situation, training_memory
from .shapes import ModelShape

Change = Callable[[Situation], "Situation | None"]


@dataclass(frozen=True)
class Remedy:
    """Settings that make a stage fit."""

    settings: tuple[str, ...]
    """As overrides of the recipe: ``trainer.micro_batch=1``."""
    roles: Roles
    """What it takes then."""


def usable(device_bytes: int) -> int:
    """What tensors may take of a GPU."""
    return int(device_bytes * (1 - RESERVE))


def cheapest_fit(student: ModelShape, teacher: ModelShape | None, case: Situation, device_bytes: int) -> Remedy | None:
    """Changes are tried in order of their cost, each on top of those that saved something and did not suffice; None: nothing helps."""
    best, applied = training_memory(student, teacher, case), []
    for name, changed in _changes(case, teacher is not None):
        trial = changed(case)
        if trial is None:
            continue
        roles = training_memory(student, teacher, trial)
        if roles.total >= best.total:
            continue
        if roles.total <= usable(device_bytes):
            return Remedy((*_without(applied, name), name), roles)
        best, case, applied = roles, trial, [*_without(applied, name), name]
    return None


def _without(applied: list[str], name: str) -> list[str]:
    """Earlier settings of the same key are overtaken."""
    key = name.partition("=")[0]
    return [other for other in applied if other.partition("=")[0] != key]


def _changes(case: Situation, taught: bool) -> Iterator[tuple[str, Change]]:
    for size in sorted((s for s in divisors(case.plan.batch.micro_batch) if s < case.plan.batch.micro_batch), reverse=True):
        yield f"trainer.micro_batch={size}", _micro_batch(size)
    if case.ranks > 1:
        yield "trainer.strategy=fsdp2", lambda c: None if c.sharded else replace(c, plan=replace(c.plan, strategy="fsdp2"))
    yield "trainer.activation_checkpointing=true", _checkpointing
    if taught and case.ranks > 1 and case.load_in in ("bf16", "fp32"):
        yield "teacher.placement=sharded", lambda c: replace(c, placement="sharded") if c.placement == "replicated" else None
    yield "trainer.optimizer=adamw-8bit", lambda c: replace(c, plan=replace(c.plan, optimizer="adamw-8bit"))
    if taught:
        yield "teacher.load_in=nf4", lambda c: replace(c, load_in="nf4", placement="replicated")
        yield "teacher.placement=offloaded", lambda c: replace(c, load_in="bf16", placement="offloaded")
    for more in (2, 4, 8, 16, 32, 64):
        if more > case.ranks:
            yield f"gpus={more}", _more_gpus(more)


def _micro_batch(size: int) -> Change:
    def change(case: Situation) -> Situation:
        batch = case.plan.batch
        smaller = replace(batch, micro_batch=size, accumulation=batch.accumulation * batch.micro_batch // size)
        return replace(case, plan=replace(case.plan, batch=smaller))

    return change


def _checkpointing(case: Situation) -> Situation | None:
    return None if case.plan.activation_checkpointing else replace(case, plan=replace(case.plan, activation_checkpointing=True))


def _more_gpus(ranks: int) -> Change:
    def change(case: Situation) -> Situation | None:
        if case.plan.batch.global_windows % ranks:
            return None
        batch = case.plan.batch
        micro = max(size for size in divisors(batch.global_windows // ranks) if size <= batch.micro_batch)
        fewer = replace(batch, micro_batch=micro, accumulation=batch.global_windows // ranks // micro)
        return replace(case, ranks=ranks, plan=replace(case.plan, strategy="fsdp2", batch=fewer))

    return change
