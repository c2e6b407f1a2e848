"""Finds the cheapest change that makes a stage fit a GPU: changes without cost in quality or time first, more GPUs last."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ...trainer.plan import divisors
from .memory import RESERVE, Roles, training_memory
from .memory_case import StageMemoryCase
from .shapes import ModelShape

Change = Callable[[StageMemoryCase], "StageMemoryCase | None"]


@dataclass(frozen=True)
class Remedy:
    """Settings that make a stage fit."""

    settings: tuple[str, ...]
    """Overrides of the recipe: ``trainer.micro_batch=1``."""
    roles: Roles
    """Memory with these settings."""


def usable(device_bytes: int) -> int:
    """Return the bytes of a GPU that tensors may use."""
    return int(device_bytes * (1 - RESERVE))


def cheapest_fit(student: ModelShape, teacher: ModelShape | None, case: StageMemoryCase, device_bytes: int) -> Remedy | None:
    """Return the settings that make a stage fit; None if nothing helps.

    Changes are tried in order of cost, each on top of the earlier ones that saved memory but did not suffice; then unnecessary ones are
    reverted.
    """

    def roles(changes: Sequence[Change]) -> Roles:
        return training_memory(student, teacher, _changed(case, changes))

    least, applied = roles([]).total, list[Change]()
    for change in _changes(case, teacher is not None):
        total = roles([*applied, change]).total
        # a change that saves nothing is not proposed, even if a later one makes the stage fit
        if total >= least:
            continue
        least = total
        applied.append(change)
        if total <= usable(device_bytes):
            break
    else:
        return None
    # the last change is the one that made it fit; an earlier, cheaper one may be unnecessary with it
    for change in applied[:-1]:
        fewer = [other for other in applied if other is not change]
        if roles(fewer).total <= usable(device_bytes):
            applied = fewer
    return Remedy(_overrides(case, _changed(case, applied)), roles(applied))


def _changed(case: StageMemoryCase, changes: Sequence[Change]) -> StageMemoryCase:
    for change in changes:
        case = change(case) or case
    return case


def _overrides(case: StageMemoryCase, changed: StageMemoryCase) -> tuple[str, ...]:
    """Return the overrides that lead from one case to the other; compared by result, so changes that undo each other name nothing."""
    before, after = case.plan, changed.plan
    named = {
        "trainer.micro_batch": (before.batch.micro_batch, after.batch.micro_batch),
        "trainer.strategy": (before.strategy, after.strategy),
        "trainer.activation_checkpointing": (before.activation_checkpointing, after.activation_checkpointing),
        "trainer.optimizer": (before.optimizer, after.optimizer),
        "teacher.load_in": (case.load_in, changed.load_in),
        "teacher.placement": (case.placement, changed.placement),
        # no key of a recipe: the number of processes to start
        "gpus": (case.ranks, changed.ranks),
    }
    return tuple(f"{key}={str(new).lower() if isinstance(new, bool) else new}" for key, (old, new) in named.items() if old != new)


def _changes(case: StageMemoryCase, taught: bool) -> Iterator[Change]:
    # free of cost in quality: the loss is a mean over the whole step, however it is cut (law 1, docs/architecture.md); large steps first,
    # since small batches use a GPU badly
    for size in sorted((s for s in divisors(case.plan.batch.micro_batch) if s < case.plan.batch.micro_batch), reverse=True):
        yield _micro_batch(size)
    if case.ranks > 1:
        # costs traffic between the GPUs
        yield lambda c: None if c.sharded else replace(c, plan=replace(c.plan, strategy="fsdp2"))
    # costs a third of the time: the forward pass runs twice
    yield lambda c: None if c.plan.activation_checkpointing else replace(c, plan=replace(c.plan, activation_checkpointing=True))
    # bitsandbytes' weights are whole on every GPU (``TeacherSettings``)
    if taught and case.ranks > 1 and case.load_in in ("bf16", "fp32"):
        yield lambda c: replace(c, placement="sharded") if c.placement == "replicated" else None
    # from here on numbers change: rounded moments, then a rounded teacher
    yield lambda c: replace(c, plan=replace(c.plan, optimizer="adamw-8bit"))
    if taught:
        # nf4 cannot be sharded, so the placement goes back
        yield lambda c: replace(c, load_in="nf4", placement="replicated")
        # the slowest: each layer of the teacher crosses the bus in every step
        yield lambda c: replace(c, load_in="fp32" if c.load_in == "fp32" else "bf16", placement="offloaded")
    # doubled, as machines have them, up to eight machines of eight
    for more in (2, 4, 8, 16, 32, 64):
        if more > case.ranks:
            yield _more_gpus(more)


def _micro_batch(size: int) -> Change:
    def change(case: StageMemoryCase) -> StageMemoryCase:
        batch = case.plan.batch
        # the step keeps its windows: what the micro-batch loses, accumulation gains
        smaller = replace(batch, micro_batch=size, accumulation=batch.accumulation * batch.micro_batch // size)
        return replace(case, plan=replace(case.plan, batch=smaller))

    return change


def _more_gpus(ranks: int) -> Change:
    def change(case: StageMemoryCase) -> StageMemoryCase | None:
        # every rank must get the same number of whole windows
        if case.plan.batch.global_windows % ranks:
            return None
        batch = case.plan.batch
        # the micro-batch stays as large as a rank's share allows
        micro = max(size for size in divisors(batch.global_windows // ranks) if size <= batch.micro_batch)
        fewer = replace(batch, micro_batch=micro, accumulation=batch.global_windows // ranks // micro)
        return replace(case, ranks=ranks, plan=replace(case.plan, strategy="fsdp2", batch=fewer))

    return change
