"""From a stage that wants a cached teacher to one that is whole: what is missing is captured by all ranks together."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ...losses.settings import LossSettings
from ...models.common.errors import UserError
from ...models.common.files import sha256_json
from ...models.common.locks import Lock, no_locks
from ...models.families import head_transform
from ...models.folder.loading import load_config
from ...models.settings import CacheSettings
from ...models.teachers import LocalTeacher
from ..cache import cache_dir
from ..data.order import StepBatches
from ..data.tokens import tokenizer_hash
from ..plan import StepPlan
from ..processes.world import current_world, sum_over_ranks, value_of_first
from .cached import CachedTeacher, row_format
from .capture import capture, missing_windows
from .packed_rows import RowFormat
from .served import ServedTeacher
from .store import Store, open_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..data.windows import Windows
    from ..stages.context import StageContext

_POLL_SECONDS = 0.5


def stage_windows(plan: StepPlan, windows: "Windows") -> list[int]:
    """Windows that a stage will see, ascending, each once: a stage of few tokens needs a small cache."""
    needed = plan.total_steps * plan.batch.global_windows
    if needed >= len(windows):
        return list(range(len(windows)))
    batches = StepBatches(
        windows, global_batch=needed, micro_batch=needed, rank=0, world=1, seed=plan.seed, start_step=0, total_steps=1
    )  # fmt: skip
    return sorted(set(batches.positions(0, needed)))


def cached_teacher(
    context: "StageContext", loss: LossSettings, plan: StepPlan, open_teacher: "Callable[[], LocalTeacher | ServedTeacher]"
) -> CachedTeacher:
    """The recipe's teacher, read from its cache; what the stage needs and the cache lacks is captured first (all ranks call this).

    Args:
        context: Of the stage.
        loss: Its temperature is that of the cache.
        plan: Says which windows the stage will see.
        open_teacher: Opens the teacher itself; only called when something is missing.

    Raises:
        UserError: see ``open_store`` and ``Store.add``; or the loss needs more than a cache has.
    """
    teacher = context.teacher
    assert teacher is not None
    assert teacher.cache is not None
    if loss.divergence != "forward_kl":
        raise UserError(f"{context.name}: loss.divergence: {loss.divergence} needs the whole distribution; a cache gives forward_kl alone")
    form = row_format(teacher.cache, context.v_eff, loss.temperature or 1.0)
    header = _header(context, teacher.cache, form)
    store = open_store(_folder(teacher.cache, header), header)
    windows = context.data.train
    world = current_world()
    for problem in store.refresh(thorough=world.is_first):
        if world.is_first:
            context.say(f"  damaged shard of the teacher's cache is made again: {problem}")
    _together()
    store.refresh()
    needed = stage_windows(plan, windows)
    missing = missing_windows(store, windows, needed)
    # another run may have added some between the looks of two ranks
    if float(sum_over_ranks(torch.tensor([len(missing)], dtype=torch.float64))):
        with _alone(store, context):
            store.refresh()
            if missing := missing_windows(store, windows, needed):
                _fill(context, store, form, windows, missing, open_teacher)
    if world.is_first:
        context.say(f"  teacher's cache {store.folder}: {_measured(store, form)}")
    return CachedTeacher(store, form, teacher.name)


def _header(context: "StageContext", settings: CacheSettings, form: RowFormat) -> dict[str, Any]:
    teacher = context.teacher
    assert teacher is not None
    transform = head_transform(load_config(teacher.path, revision=teacher.revision))
    served = {"served": teacher.served.model, "served_tokens": teacher.served.tokens} if teacher.served else {}
    return {
        **served,
        "teacher": teacher.content,
        "teacher_name": teacher.name,
        "load_in": teacher.load_in,
        "tokenizer": tokenizer_hash(context.tokenizer),
        "v_eff": form.v_eff,
        "temperature": form.temperature,
        "mode": settings.mode,
        "tokens": form.top + form.others,
        "softcap": transform.softcap,
        "logit_scale": transform.logit_scale,
        "bytes_per_token": form.bytes,
    }


def _folder(settings: CacheSettings, header: dict[str, Any]) -> Any:
    from pathlib import Path

    return Path(settings.path).expanduser() if settings.path else cache_dir() / "teacher-caches" / sha256_json(header)[:32]


def _fill(
    context: "StageContext",
    store: Store,
    form: RowFormat,
    windows: "Windows",
    missing: Sequence[int],
    open_teacher: "Callable[[], LocalTeacher | ServedTeacher]",
) -> None:
    """Capture ``missing``, this rank its share of it, and wait until all of it is there."""
    world = current_world()
    tokens = len(missing) * windows.seq_length
    context.say(
        f"  the teacher predicts {len(missing):,} windows ({tokens:,} tokens) once: at most {form.bytes} bytes a token, "
        f"{form.bytes * tokens / 1e6:,.1f} MB, in {store.folder}"
    )
    # a sharded teacher needs all ranks in each of its passes, so that all make the same number
    share = -(-len(missing) // world.size)
    own = [missing[(world.rank * share + step) % len(missing)] for step in range(share)]
    from ..progress import token_progress

    with token_progress(context.console, "teacher", share * windows.seq_length * world.size) as advance:
        for done in capture(open_teacher(), windows, own, store, form):
            advance(done * world.size)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    store.refresh()
    while world.size > 1 and missing_windows(store, windows, missing):
        time.sleep(_POLL_SECONDS)
        store.refresh()


def _measured(store: Store, form: RowFormat) -> str:
    """Size and error of everything in the cache, in words."""
    tokens = sum(shard.figures["tokens"] for shard in store.shards.values())
    kl = sum(shard.figures["kl"] for shard in store.shards.values()) / max(tokens, 1)
    size = sum(entry.stat().st_size for entry in (store.folder / "shards").iterdir())
    what = "KL(cache || teacher)" if form.tail else "KL(one draw || teacher)"
    return f"{tokens:,.0f} tokens, {size / max(tokens, 1):.1f} bytes a token with its index, {what} {kl:.2e} nats a token"


@contextmanager
def _alone(store: Store, context: "StageContext") -> Iterator[None]:
    """Hold the cache's lock on rank 0, so that two runs do not ask the teacher the same. All ranks wait, in short collectives."""
    world, lock, told = current_world(), Lock(store.folder / "lock"), False
    with lock:
        while not value_of_first(int(world.is_first and lock.acquire())):
            if world.is_first and not told:
                context.say(f"  {lock.holder()} fills the same teacher's cache; waiting for it")
                told = True
            time.sleep(_POLL_SECONDS)
        if not lock.lockable:
            context.say(f"  {no_locks(lock.file)}")
        yield
        # nobody goes on to read before everybody has written
        _together()


def _together() -> None:
    """All ranks have come this far."""
    sum_over_ranks(torch.zeros(1, dtype=torch.float64))
