"""The token stream of a text: encoded by this process alone, or by several, of which each takes its part (``shared_text.py``)."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.folder.loading import load_tokenizer
from ..processes.world import World
from ..settings import DataSettings
from .chats import write_chats
from .documents import Documents
from .samples import Samples
from .shared_text import SharedText
from .tokens import TokenStream, write_tokens
from .unfinished import UNITS_ENDING, Unfinished, unfinished

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = tuple[TokenStream, dict[str, Any] | None, Counter[str]]
"""(all tokens, for conversations the numbers of rows read and left out, what is not learned by reason)."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Helpers:
    """Other processes that wait while rank 0 prepares the text."""

    world: World
    ask: Callable[[str], None]
    """Called with a folder, for which each of them then calls ``help_encoding``."""


@contextmanager
def encoded(
    settings: DataSettings,
    tokenizer: "PreTrainedTokenizerBase",
    documents: Documents,
    target: Path,
    spare: Path,
    helpers: Helpers | None,
    say: Say,
) -> Iterator[Encoded]:
    """The stream of the cache entry ``target``, whose files may be removed afterwards; an interrupted one is continued.

    Args:
        settings, tokenizer, documents, helpers, say: As for ``prepare_data``.
        target: The entry.
        spare: Folder for the stream while another process works on the same entry.
    """
    folder = _units_folder(target)
    # a shard of the hub is fetched once: a process that is killed must not fetch the others again
    in_parts = helpers is not None or folder.exists() or settings.hub_shards
    units = documents.divide() if documents.divide is not None and in_parts else []
    # a single unit is one process's work, which continues inside it after a kill
    if len(units) > 1:
        yield _shared(SharedText.begin(folder, units, settings, tokenizer), documents, helpers, say)
        return
    with unfinished(target, spare) as work:
        yield _write_stream(settings, tokenizer, documents, work, say)


def help_encoding(folder: str, settings: DataSettings, tokenizer: tuple[str, str | None], world: World, say: Say) -> None:
    """Encodes this process's part of a text that rank 0 prepares.

    Args:
        folder: What rank 0 has asked for.
        settings: The text and how it is encoded, as on rank 0.
        tokenizer: Path and revision of the tokenizer.
        world: This process among all.
        say: Called with a line if this machine lacks files.

    Raises:
        UserError: this machine does not see the folder, or loads another tokenizer.
    """
    path, revision = tokenizer
    shared = SharedText.join(Path(folder), settings, load_tokenizer(path, revision=revision))
    shared.encode_share(world, say)


def forget_units(target: Path) -> None:
    """Removes the units of a finished entry."""
    shutil.rmtree(_units_folder(target), ignore_errors=True)


def _units_folder(target: Path) -> Path:
    return target.with_name(target.name + UNITS_ENDING)


def _shared(shared: SharedText, documents: Documents, helpers: Helpers | None, say: Say) -> Encoded:
    done = len(shared.units) - len(shared.missing())
    if done:
        say(f"tokenizing continues after {done:,} of {len(shared.units):,} parts of the text")
    if helpers is not None:
        helpers.ask(str(shared.folder))
    # without helpers, this process continues what several have begun
    shared.encode_all(helpers.world if helpers is not None else World(), say)
    stream, found = shared.stream()
    if documents.chats is None:
        return stream, None, documents.passed + found.read + found.encoded
    found.samples.check()
    return stream, *_counts(found.samples, documents, say)


def _write_stream(
    settings: DataSettings, tokenizer: "PreTrainedTokenizerBase", documents: Documents, work: Unfinished, say: Say
) -> Encoded:
    control = settings.reads_control_tokens
    if documents.chats is None:
        stream = write_tokens(documents, tokenizer, work, say=say, need_end=settings.packing, control=control)
        return stream, None, documents.passed + documents.notes + work.notes
    samples = Samples()
    stream = write_chats(
        documents.chats(),
        tokenizer,
        work.stream,
        mask_prompts=settings.mask_prompts,
        samples=samples,
        control=control,
        seq_length=settings.seq_length,
    )
    return stream, *_counts(samples, documents, say)


def _counts(samples: Samples, documents: Documents, say: Say) -> tuple[dict[str, Any], Counter[str]]:
    if samples.bad:
        say(f"{samples.bad:,} of {samples.read:,} conversations were left out; the first: {samples.first_bad}")
    reasons = Counter({f"conversations: {why}": count for why, count in samples.reasons.items()})
    counts = {"read": samples.read, "bad": samples.bad, "first_bad": samples.first_bad}
    return counts, documents.passed + reasons + samples.notes
