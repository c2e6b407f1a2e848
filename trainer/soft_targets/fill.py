"""Opens the teacher cache of a stage. All ranks together capture the windows that are missing."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...losses.settings import LossSettings
from ...models.common.cache_folder import cache_dir
from ...models.common.errors import UserError
from ...models.common.files import sha256_json
from ...models.common.locks import Lock, no_locks
from ...models.families import backbone_and_head, head_transform
from ...models.folder.loading import load_config, meta_model
from ...models.settings import CacheSettings
from ...models.teachers import LocalTeacher, TeacherRef
from ..data.order import WindowOrder
from ..data.tokens import tokenizer_hash
from ..plan import StepPlan
from ..processes.world import current_world, sum_over_ranks, value_of_first
from ..progress import print_line, token_progress
from .cached import CachedStates, CachedTeacher, row_format
from .capture import capture, missing_windows, stack
from .hidden_rows import HiddenFormat, drop_head, head_is_there, write_head
from .packed_rows import RowFormat
from .served import ServedTeacher
from .store import Store, open_store

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from ..data.windows import Windows

_POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class CacheRequest:
    """Request of a stage for a teacher cache."""

    stage: str
    """Name of the stage that trains from the cache, for messages."""
    teacher: TeacherRef
    cache: CacheSettings
    """What the cache keeps of each prediction, and its path."""
    windows: "Windows"
    """Windows of the training text."""
    tokenizer: "PreTrainedTokenizerBase"
    v_eff: int
    """Size of the real vocabulary."""
    console: "Console"
    open_teacher: Callable[[], LocalTeacher | ServedTeacher]
    """Opens the teacher itself; called only when the cache lacks windows."""

    def say(self, text: str) -> None:
        """Print a line of the run's output."""
        print_line(self.console, text)


def stage_windows(steps: StepPlan, windows: "Windows") -> list[int]:
    """Indices of the windows that a stage sees, ascending, each once. A stage with few tokens needs only a small cache."""
    return WindowOrder(windows, steps.seed).seen(steps.total_steps * steps.batch.global_windows)


def cached_teacher(wanted: CacheRequest, loss: LossSettings, steps: StepPlan) -> CachedTeacher | CachedStates:
    """Teacher of the recipe, read from its cache. Missing windows are captured first (all ranks call this).

    Args:
        wanted: Teacher, cache settings and text.
        loss: Loss of the stage; the cache is taken at its temperature.
        steps: Plan that decides which windows the stage sees.

    Raises:
        UserError: see ``open_store`` and ``Store.add``; or the divergence needs more than the cache keeps.
    """
    if loss.divergence != "forward_kl" and not wanted.cache.whole:
        raise UserError(
            f"{wanted.stage}: loss.divergence: {loss.divergence} needs the whole distribution; a cache gives forward_kl alone, except with "
            "teacher.cache.mode: hidden"
        )
    form = _form(wanted, loss)
    header = _header(wanted, form)
    store = open_store(_folder(wanted.cache, header), header)
    windows = wanted.windows
    world = current_world()
    # only rank 0 compares hashes and removes damaged shards; the other ranks read again after the barrier
    for problem in store.refresh(thorough=world.is_first):
        if world.is_first:
            wanted.say(f"  damaged shard of the teacher's cache is made again: {problem}")
    whole = not isinstance(form, HiddenFormat)
    if not whole and world.is_first and not head_is_there(store.folder, thorough=True):
        drop_head(store.folder)
    # a barrier: no rank may map a shard that rank 0 is about to remove
    _together()
    store.refresh()
    needed = stage_windows(steps, windows)
    missing = missing_windows(store, windows, needed)
    # summed over ranks: another run may have added windows between the reads of two ranks, and all must take the same branch
    lacking = len(missing) + int(not whole and not head_is_there(store.folder, thorough=False))
    if float(sum_over_ranks(torch.tensor([lacking], dtype=torch.float64))):
        # all ranks enter together, see the sum above
        with _alone(store, wanted):
            store.refresh()
            # another run may have filled the cache while this one waited for the lock
            missing = missing_windows(store, windows, needed)
            # rank 0 decides: it may have written the head before another rank looks
            head = whole or bool(value_of_first(int(head_is_there(store.folder, thorough=False))))
            if missing or not head:
                _fill(wanted, store, form, missing, head=head)
    if world.is_first:
        wanted.say(f"  teacher's cache {store.folder}: {_measured(store, form)}")
    if isinstance(form, HiddenFormat):
        return CachedStates(store, form, head_transform(_config(wanted)), wanted.teacher.name)
    return CachedTeacher(store, form, wanted.teacher.name)


def _config(wanted: CacheRequest) -> "PreTrainedConfig":
    return load_config(wanted.teacher.path, revision=wanted.teacher.revision)


def _form(wanted: CacheRequest, loss: LossSettings) -> RowFormat | HiddenFormat:
    """Layout of the cache's rows, for the loss's temperature where rows depend on it."""
    if not wanted.cache.whole:
        return row_format(wanted.cache, wanted.v_eff, loss.temperature or 1.0)
    # the head's own width: of some families it is not the hidden size
    width = backbone_and_head(meta_model(_config(wanted)))[1].shape[1]
    return HiddenFormat(wanted.v_eff, width, wanted.cache.states or "bf16")


def _header(wanted: CacheRequest, form: RowFormat | HiddenFormat) -> dict[str, Any]:
    """Values that must be equal for a cache to be reused: teacher, tokenizer, and format of each position."""
    teacher = wanted.teacher
    transform = head_transform(_config(wanted))
    served = {"served": teacher.served.model, "served_tokens": teacher.served.tokens} if teacher.served else {}
    return {
        **served,
        "teacher": teacher.content,
        "teacher_name": teacher.name,
        "load_in": teacher.load_in,
        "tokenizer": tokenizer_hash(wanted.tokenizer),
        "v_eff": form.v_eff,
        "mode": wanted.cache.mode,
        # states are those of every temperature
        **(
            {"hidden": form.hidden, "states": form.states}
            if isinstance(form, HiddenFormat)
            else {"temperature": form.temperature, "tokens": form.top + form.others}
        ),
        # from the config, so a change of it is found even where the weights are the same
        "softcap": transform.softcap,
        "logit_scale": transform.logit_scale,
        "bytes_per_token": form.bytes,
    }


def _folder(settings: CacheSettings, header: dict[str, Any]) -> Path:
    return Path(settings.path).expanduser() if settings.path else cache_dir() / "teacher-caches" / sha256_json(header)[:32]


def _fill(wanted: CacheRequest, store: Store, form: RowFormat | HiddenFormat, missing: Sequence[int], *, head: bool) -> None:
    """Capture this rank's share of the windows ``missing``, and wait until the store has all of them; the head too if it is not there."""
    world, windows = current_world(), wanted.windows
    tokens = len(missing) * windows.seq_length
    if missing:
        wanted.say(
            f"  the teacher predicts {len(missing):,} windows ({tokens:,} tokens) once: at most {form.bytes} bytes a token, "
            f"{form.bytes * tokens / 1e6:,.1f} MB, in {store.folder}"
        )
    teacher = wanted.open_teacher()
    if not head:
        _store_head(teacher, windows, store)
    if not missing:
        return
    # a sharded teacher needs all ranks in each forward pass, so all ranks make the same number (some windows twice)
    share = -(-len(missing) // world.size)
    own = [missing[(world.rank * share + step) % len(missing)] for step in range(share)]
    with token_progress(wanted.console, "teacher", share * windows.seq_length * world.size) as advance:
        # shards are written as they fill: an interrupted capture continues with the windows that are still missing
        for done in capture(teacher, windows, own, store, form):
            advance(done * world.size)
    del teacher
    if torch.cuda.is_available():
        # the teacher is gone; give its memory to the student
        torch.cuda.empty_cache()
    store.refresh()
    # other ranks may be slower; there is no collective here that could time out
    while world.size > 1 and missing_windows(store, windows, missing):
        time.sleep(_POLL_SECONDS)
        store.refresh()


def _store_head(teacher: LocalTeacher | ServedTeacher, windows: "Windows", store: Store) -> None:
    """Write the teacher's head on rank 0; all ranks run one window, because a sharded teacher computes in step."""
    assert isinstance(teacher, LocalTeacher), "a server gives no hidden states, and recipes that ask for them are refused"
    _, weight, bias, _ = teacher.hidden_and_head(stack(windows, [0]))
    if current_world().is_first:
        write_head(store.folder, weight, bias)
    _together()


def _measured(store: Store, form: RowFormat | HiddenFormat) -> str:
    """Sentence with the size of the cache and its mean KL from the teacher."""
    tokens = sum(shard.figures["tokens"] for shard in store.shards.values())
    kl = sum(shard.figures["kl"] for shard in store.shards.values()) / max(tokens, 1)
    size = store.bytes_on_disk()
    if isinstance(form, HiddenFormat):
        worst = max((shard.figures["worst_kl"] for shard in store.shards.values()), default=0.0)
        error = f"{kl:.2e} nats a token, at most {worst:.2e}" if worst else "0: states are stored as they are"
        return f"{tokens:,.0f} tokens, {size / max(tokens, 1):.1f} bytes a token with its index, KL(cache || teacher) {error}"
    what = "KL(cache || teacher)" if form.tail else "KL(one draw || teacher)"
    return f"{tokens:,.0f} tokens, {size / max(tokens, 1):.1f} bytes a token with its index, {what} {kl:.2e} nats a token"


@contextmanager
def _alone(store: Store, wanted: CacheRequest) -> Iterator[None]:
    """Hold the cache's lock on rank 0, so that two runs do not compute the same predictions. All ranks wait in short collectives."""
    world, lock, told = current_world(), Lock(store.folder / "lock"), False
    with lock:
        # polling, not a blocking wait: a collective that waits for hours would time out
        while not value_of_first(int(world.is_first and lock.acquire())):
            if world.is_first and not told:
                wanted.say(f"  {lock.holder()} fills the same teacher's cache; waiting for it")
                told = True
            time.sleep(_POLL_SECONDS)
        if not lock.lockable:
            wanted.say(f"  {no_locks(lock.file)}")
        yield
        # no rank reads before all ranks have written
        _together()


def _together() -> None:
    """Barrier: return once all ranks have called this."""
    sum_over_ranks(torch.zeros(1, dtype=torch.float64))
